"""Parquet files with a hash next to them: reading returns what was written, or raises an error that names the file.

TABLE/run_id=RUN/part-0.parquet      the rows, with a checksum in each page
TABLE/run_id=RUN/_part-0.sha256      hash of the whole file; Parquet readers skip names that begin with "_"
"""

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from quantlib.errors import StoreError, reason_of
from quantlib.files import read_file, write_atomically

_FILE, _HASH = "part-0.parquet", "_part-0.sha256"


def write(place: Path, table: pa.Table) -> None:
    """Write the table of a run, whole or not at all.

    Args:
        place: The run's folder; created if it is missing.
        table: Its rows.

    Raises:
        MachineError: If the disk is full.
    """
    content = io.BytesIO()
    pq.write_table(table, content, write_page_checksum=True)
    # Between the two writes, and after a crash there, the file has no hash: none is better than a wrong one.
    (place / _HASH).unlink(missing_ok=True)
    write_atomically(place / _FILE, content.getvalue())
    write_atomically(place / _HASH, hashlib.sha256(content.getvalue()).hexdigest().encode())


def read(place: Path, schema: pa.Schema) -> pa.Table:
    """Read a run's table; columns missing from the file are null, and columns outside the schema are left out.

    Args:
        place: The run's folder.
        schema: Schema of the result.

    Raises:
        StoreError: If the file is missing or damaged.
    """
    try:
        content = read_file(place / _FILE)
        if (place / _HASH).exists() and read_file(place / _HASH).decode() != hashlib.sha256(content).hexdigest():
            raise ValueError("its content is no longer what was written")  # noqa: TRY301 (reported as other damage)
        # With threads, pyarrow has been seen to kill the process after reading damaged files.
        found = pq.read_table(pa.BufferReader(content), page_checksum_verification=True, use_threads=False)
        columns = [
            found[field.name].cast(field.type) if field.name in found.column_names else pa.nulls(len(found), field.type)
            for field in schema
        ]
        return pa.table(columns, schema=schema)
    # Whatever pyarrow raises on damage, for example in files written before there were hashes.
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        run_id = place.name.removeprefix("run_id=")
        raise StoreError(
            f"The report {place / _FILE} is damaged ({reason_of(error)}). `quantflow resume {run_id}` rebuilds it from "
            "the store."
        ) from None

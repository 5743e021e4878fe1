from pathlib import Path

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from flows.hosting import dashboard
from flows.parameters import find_recipe, packaged_recipes
from flows.ptq import ptq
from flows.qat import qat
from flows.quantize import quantize
from quantlib.errors import RecipeError
from quantlib.recipe.file import override_recipe
from quantlib.recipe.schema import Recipe

PROJECT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]


def test_a_flow_takes_a_recipe_by_name_by_file_or_field_by_field():
    loaded = find_recipe("digits")
    for given in ("digits", str(packaged_recipes()["digits"]), loaded, loaded.model_dump(mode="json")):
        assert quantize.validate_parameters({"recipe": given})["recipe"] == loaded


def test_an_unknown_recipe_is_an_error_that_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'digits'"):
        quantize.validate_parameters({"recipe": "digit"})


def test_changes_are_made_as_the_command_line_makes_them():
    changes = ("qat.0.epochs=2", "gate.max_top1_drop=0.5")
    assert override_recipe(find_recipe("digits"), changes) == find_recipe("digits", changes)


def test_a_change_of_an_unknown_key_is_an_error():
    with pytest.raises(RecipeError, match=r"Unknown key 'gate.max_drop'"):
        override_recipe(find_recipe("digits"), ["gate.max_drop=0.5"])


@pytest.mark.parametrize("flow", [quantize, ptq, qat], ids=lambda flow: flow.name)
def test_the_form_of_each_flow_describes_every_field(flow):
    schema = parameter_schema(flow.fn).model_dump()
    assert all(schema["properties"][name]["description"] for name in ("recipe", "changes"))
    assert [kind.get("type") for kind in schema["properties"]["recipe"]["anyOf"]] == ["string", None]
    fields = [
        (section, field, details)
        for section, definition in schema["definitions"].items()
        for field, details in definition["properties"].items()
    ]
    assert len(fields) > len(Recipe.model_fields)
    # A reference to a section inherits the section's description.
    bare = [f"{section}.{field}" for section, field, details in fields if not {"description", "$ref"} & set(details)]
    assert bare == []
    assert all(definition["description"] for definition in schema["definitions"].values())


@pytest.mark.parametrize("flow", [quantize, ptq, qat], ids=lambda flow: flow.name)
def test_the_form_of_each_flow_bounds_every_value(flow):
    schema = parameter_schema(flow.fn).model_dump()
    assert list(unbounded(schema, "form")) == []


def unbounded(schema, where):
    """Places in a JSON schema where a value may be arbitrarily large."""
    needed = {
        "string": {"maxLength", "pattern"},
        "integer": {"minimum", "maximum"},
        "number": {"minimum", "maximum"},
        "array": {"maxItems", "items"},
        "boolean": set(),
        "null": set(),
    }
    stated = {{"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}.get(key, key) for key in schema}
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False and where != "form":
            yield from (where for _ in {"maxProperties", "propertyNames"} - stated)
            yield from unbounded(schema["additionalProperties"], f"{where}.*")
    elif "enum" not in schema and "const" not in schema and "$ref" not in schema and "anyOf" not in schema:
        if "prefixItems" in schema:
            assert stated >= {"minItems", "maxItems"}
        elif "type" not in schema or not needed[schema["type"]] <= stated:
            yield where
    for name in ("properties", "definitions"):
        for key, part in schema.get(name, {}).items():
            yield from unbounded(part, f"{where}.{key}")
    for number, part in enumerate([*schema.get("anyOf", []), *schema.get("prefixItems", [])]):
        yield from unbounded(part, f"{where}[{number}]")
    if isinstance(schema.get("items"), dict):
        yield from unbounded(schema["items"], f"{where}[]")


def test_deployments_are_made_again_when_a_field_of_the_recipe_changes_in_any_module(monkeypatch):
    before = dashboard.digest_deployments()
    assert dashboard.digest_deployments() == before
    schema = Recipe.model_json_schema()
    schema["$defs"]["PTQRecipe"]["properties"]["observer"]["anyOf"][0]["enum"].append("quantile")
    monkeypatch.setattr(Recipe, "model_json_schema", lambda: schema)
    assert dashboard.digest_deployments() != before


def test_every_flow_is_deployed_with_a_schedule_of_its_own():
    assert {d["entrypoint"].partition(":")[2] for d in DEPLOYMENTS} == {"quantize", "ptq", "qat"}
    crons = [schedule["cron"] for d in DEPLOYMENTS for schedule in d["schedules"]]
    assert len(set(crons)) == len(DEPLOYMENTS)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["entrypoint"])
def test_the_deployments_parameters_are_valid_and_one_run_at_a_time(deployment):
    flow = {"quantize": quantize, "ptq": ptq, "qat": qat}[deployment["entrypoint"].partition(":")[2]]
    assert flow.validate_parameters(deployment["parameters"])["recipe"] == find_recipe("digits")
    assert deployment["concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_limit"]["grace_period_seconds"] <= 60

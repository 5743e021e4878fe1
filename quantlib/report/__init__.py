"""The report: its tables, the verdict, and the pages made from them."""

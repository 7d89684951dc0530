"""The state of an open warehouse: how it is opened, changed in step with the tables, and listed."""

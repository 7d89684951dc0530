"""What operators ask of an open warehouse: devices, tenants, purges, usage, advice."""

"""One module a job: read, compose stages, write. Run with `python -m jobs.<name> [config.yaml] field=value …`."""

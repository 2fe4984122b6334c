"""One file a claim, one table as output: `python -m benchmarks NAME [--json FILE]`."""

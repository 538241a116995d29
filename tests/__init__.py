"""All tests: `unit` without processes, `integration` with a real Redis, `e2e` with whole stacks."""

"""End-to-end tests start whole stacks in their fixtures: that time is theirs as well."""

import pytest

STACK_SECONDS = 180


def pytest_collection_modifyitems(items):
    for item in items:
        if "e2e" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(STACK_SECONDS))

"""Loads the suite's fixtures where tests run. The process that only hands tests to others (`-n`) would wait seconds for PyTorch."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network


def pytest_configure(config):
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("shared_fixtures")

"""Helpers of this folder are no tests, and some need packages that are no part of the tests."""

collect_ignore = ["make_fixtures.py", "make_qwix_fixtures.py", "tiny_models.py", "written_cases.py"]

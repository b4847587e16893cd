"""Helpers of this folder are no tests, and one of them needs torch to be imported."""

collect_ignore = ["make_fixtures.py", "tiny_models.py", "written_cases.py"]

"""The campaign of bad calls knows a valid call of everything that is public."""

from unittest import mock

from benchmarks.trust import calls, valid


def lacking():
    """Public functions and classes without a valid call or a reason."""
    found = []
    for name, function in valid.named():
        if valid.exempt(name, function):
            continue
        try:
            valid.arguments(name, function, mock.MagicMock())
        except LookupError as error:
            found.append(str(error))
    return found


def test_everything_public_has_a_valid_call_or_a_reason(monkeypatch):
    monkeypatch.setattr(valid, "_value", lambda value, world: None)
    assert lacking() == []
    monkeypatch.delitem(calls.CALLS, "lorajax.laws.sign_change")
    assert [each.partition(" ")[0] for each in lacking()] == ["lorajax.laws.sign_change"]

"""The Python blocks of README.md and docs/ that belong to a test folder run as they are printed."""


def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert snippet.code.strip()
    snippet.run()

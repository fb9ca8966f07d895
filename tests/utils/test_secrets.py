"""Credentials in texts and documents are masked."""

from pathlib import Path

import pytest

from fastkd.utils.secrets import masked

SECRET = "hunter2canary"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@host/path",
        f"got 'https://{SECRET}@host:9000'; expected a folder",
        f"s3://bucket/cache?X-Amz-Signature={SECRET}&a=b",
        f"https://host/data.parquet?sv=1#{SECRET}",
        f"http://user:it's{SECRET}@host/",
        f"http://user:p@{SECRET}@host/?x='{SECRET}'",
        f"http://user:{SECRET}@[::1]:80/x",
        f"Authorization token: Bearer {SECRET}",
        f"--option=AWS_SECRET_ACCESS_KEY={SECRET}",
    ],
)
def test_texts(text: str) -> None:
    assert SECRET not in masked(text)
    document = masked({"command": ["fastkd", "train", text], "place": {"inner": (text, 3, None, 1.5)}})
    assert SECRET not in str(document)
    assert document["place"]["inner"][1:] == [3, None, 1.5]


@pytest.mark.parametrize(
    "text",
    [
        "/data/run=3/cache",
        "s3://bucket/cache",
        "https://host/a/b.zip",
        "alpha: got 1.5; expected 0 to 1",
        "a@b.c wrote",
    ],
)
def test_other_texts_are_kept(text: str) -> None:
    assert masked(text) == text


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HARMLESS", "some-harmless-value")
    monkeypatch.setenv("SECRETS_FOLDER", str(tmp_path))
    assert masked(f"in {tmp_path}/run") == f"in {tmp_path}/run"
    assert masked(f"error in {SECRET}, some-harmless-value") == "error in …, some-harmless-value"

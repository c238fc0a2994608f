"""Passwords of storages: found wherever they may stand, and taken out of whatever is written."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lq_plugin.utilities.hydra_files import hide_passwords, storage_passwords
from lq_plugin.utilities.passwords import masked, masked_words, passwords_in, without


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("postgresql+psycopg2://me:s3cret@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
        (
            "postgresql://host/db?user=me&password=s3cret&sslmode=require",
            "postgresql://host/db?user=me&password=***&sslmode=require",
        ),
        ("mysql://me:p@s/s:w@host/db", "mysql://me:***@host/db"),
        ("redis://:s3cret@host", "redis://:***@host"),
        ("search.storage=postgresql://me:s3%40cret@host/db", "search.storage=postgresql://me:***@host/db"),
        (
            "hydra.sweeper.storage.engine_kwargs.connect_args.password=abc",
            "hydra.sweeper.storage.engine_kwargs.connect_args.password=***",
        ),
        (
            "storage={url: x, connect_args: {passwd: 'abc', port: 1}}",
            "storage={url: x, connect_args: {passwd: '***', port: 1}}",
        ),
        (
            {"connect_args": {"password": 12345, "p": 1}, "pin": [12345]},
            {"connect_args": {"password": "***", "p": 1}, "pin": ["***"]},
        ),
        ({"wandb": {"api_key": "abc", "n": 1}, "token": 3}, {"wandb": {"api_key": "***", "n": 1}, "token": 3}),
        (
            {"db_password": "s3cret", "url": "postgresql://me:s3cret@h/d"},
            {"db_password": "***", "url": "postgresql://me:***@h/d"},
        ),
    ],
)
def test_passwords_are_found_and_masked(given: Any, wanted: Any) -> None:
    assert masked(given) == wanted


@pytest.mark.parametrize(
    "given",
    [
        "sqlite:////tmp/study.db", "postgresql://me@host/db", "postgresql://me:${oc.env:PASSWORD}@host/db", "http://host:80/path",
        "password_manager", {"passwords": 3, "seed": 1, "flag": True, "passing": "all"},
    ],
)  # fmt: skip
def test_what_is_no_password_stays(given: Any) -> None:
    assert passwords_in(given) == set()
    assert masked(given) == given


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--wandb-api-key=abc", "-v"], ["--wandb-api-key=***", "-v"]),
        (["--api-key", "-x1", "--hf-token", "a b"], ["--api-key", "***", "--hf-token", "***"]),
        (["--use-key", "--lr", "3"], ["--use-key", "--lr", "3"]),
        (["WANDB_API_KEY=a=b,c", "+logger.secret=x y"], ["WANDB_API_KEY=***", "+logger.secret=***"]),
        (["aws.credentials.id=me", "--DB-PASSWORD", "pw"], ["aws.credentials.id=***", "--DB-PASSWORD", "***"]),
        (["l={api_key: 'abc', n: 1}", "url=https://h/?token=abc&n=1"],
         ["l={api_key: '***', n: 1}", "url=https://h/?token=***&n=1"]),
        (["token=long-secret", "name=long-secret"], ["token=***", "name=***"]),
        (["storage=postgresql://me:s3cret@host/db"], ["storage=postgresql://me:***@host/db"]),
        (["max_tokens=12", "tokenizer=bert", "pad_token_id=0", "seed=1"],
         ["max_tokens=12", "tokenizer=bert", "pad_token_id=0", "seed=1"]),
    ],
)  # fmt: skip
def test_words_of_a_command_lose_keys_and_tokens(given: list[str], wanted: list[str]) -> None:
    assert masked_words(given) == wanted


def test_short_passwords_leave_other_words_alone() -> None:
    assert without({"name": "adam", "url": "x://a:ad@h", "ad": "ad"}, {"ad"}) == {
        "name": "adam",
        "url": "x://a:***@h",
        "ad": "***",
    }


def test_files_of_hydra_and_arguments_lose_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, url = "hunter2-xyz", "postgresql://me:hunter2-xyz@host/db"
    monkeypatch.setenv("STORAGE", url)
    cfg = OmegaConf.create(
        {
            "search": {"storage": "${oc.env:STORAGE}"},
            "hydra": {
                "sweep": {"dir": str(tmp_path)},
                "runtime": {"output_dir": str(tmp_path / "job")},
                "output_subdir": ".hydra",
                "sweeper": {"storage": {"_target_": "x", "connect_args": {"password": "other-one"}}},
            },
        }
    )
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    monkeypatch.setattr(sys, "argv", ["lq-search", f"search.storage={url}", "seed=1"])
    files = {
        tmp_path / "multirun.yaml": {
            "hydra": {"sweeper": {"storage": {"connect_args": {"password": "other-one"}}}},
            "seed": 1,
        },
        tmp_path / "job/.hydra/config.yaml": {"search": {"storage": url}, "name": "${search.storage}"},
        tmp_path / "job/.hydra/overrides.yaml": [f"search.storage={url}", "seed=1"],
    }
    (tmp_path / "job/.hydra").mkdir(parents=True)
    for path, content in files.items():
        OmegaConf.save(OmegaConf.create(content), path)
    found = storage_passwords(cfg)
    assert found == {secret, "other-one"}
    hide_passwords(found)
    assert sys.argv == ["lq-search", "search.storage=postgresql://me:***@host/db", "seed=1"]
    assert OmegaConf.load(tmp_path / "multirun.yaml").hydra.sweeper.storage.connect_args.password == "***"
    config = OmegaConf.load(tmp_path / "job/.hydra/config.yaml")
    assert OmegaConf.to_container(config, resolve=False) == {
        "search": {"storage": "postgresql://me:***@host/db"},
        "name": "${search.storage}",
    }
    assert list(OmegaConf.load(tmp_path / "job/.hydra/overrides.yaml")) == [
        "search.storage=postgresql://me:***@host/db",
        "seed=1",
    ]

"""Models of the hub, through the real library and the real command, from a hub on this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from neural_mri.backing import models
from neural_mri.backing.database import Sessions
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import InvalidRequest
from tests import models as families
from tests.hubs import TOKEN, Hub, hub
from tests.servers import free_port
from worker.hub import Repository
from worker.scanner import conversion

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model as people publish theirs: with what must not be taken beside it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "checkpoint")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "onnx").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "onnx/model.safetensors")
    (folder / "onnx/config.json").write_text("{}")
    return folder


def store(
    settings: Settings, served: Hub, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """The command as an operator runs it."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "NEURAL_MRI_"))
    }
    environment: Mapping[str, str] = {**own, **settings.environment(), **served.environment, **more}
    return subprocess.run(
        [sys.executable, "-m", "worker.modelstore", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def refusal(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 1, ran.stdout
    said = [line for line in ran.stderr.splitlines() if line.startswith("neural-mri: ")]
    assert len(said) == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    return said[0]


def test_a_model_is_fetched_by_its_name_at_the_commit_its_branch_stands_for_then(
    settings: Settings, sessions: Sessions, served: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    first = served.publish("acme/tiny", checkpoint)
    done = store(settings, served, "add", "mine", "hf:acme/tiny")
    assert done.returncode == 0, done.stderr
    model = sessions.read(models.get, "mine")
    assert model is not None
    assert model.source == f"hf:acme/tiny@main#{first}"
    assert model.revision == conversion.weights_digest(settings.models_dir / model.folder)
    kept = {path.name: path for path in (settings.models_dir / model.folder).iterdir()}
    assert kept.keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert {path.suffix for path in kept.values()} == {".safetensors", ".json"}
    assert not any(path.is_symlink() for path in kept.values())
    # What is not kept was not even asked for.
    assert served.taken() == kept.keys()
    assert {path.partition("acme/tiny")[0] for path in served.asked} == {"api/models/", ""}
    assert (served.home / "hub/models--acme--tiny").is_dir()

    # Its branch goes on. Whoever names no source has the model as it is, and the hub is not asked.
    shutil.copy(
        families.save("llama", tmp_path / "trained", seed=1) / "model.safetensors",
        checkpoint / "model.safetensors",
    )
    second = served.publish("acme/tiny", checkpoint)
    served.asked.clear()
    sources = "mine=hf:acme/tiny"
    for command in (("add", "mine"), ("bring",)):
        again = store(
            settings,
            served,
            *command,
            NEURAL_MRI_DEFAULT_MODEL="mine",
            NEURAL_MRI_MODEL_SOURCES=sources,
        )
        assert again.returncode == 0, again.stderr
    assert served.asked == []
    assert sessions.read(models.get, "mine") == model

    moved = store(settings, served, "add", "mine", "hf:acme/tiny")
    assert moved.returncode == 0, moved.stderr
    newer = sessions.read(models.get, "mine")
    assert newer is not None
    assert newer.source == f"hf:acme/tiny@main#{second}"
    assert newer.revision != model.revision


def test_a_model_of_the_hub_is_brought_after_one_that_is_not(
    settings: Settings, sessions: Sessions, served: Hub, checkpoint: Path, tiny_folder: Path
) -> None:
    served.publish("acme/tiny", checkpoint)
    brought = store(
        settings,
        served,
        "bring",
        NEURAL_MRI_DEFAULT_MODEL="first",
        NEURAL_MRI_PINNED_MODELS="first",
        NEURAL_MRI_MODEL_SOURCES=f"first=folder:{tiny_folder},mine=hf:acme/tiny",
    )
    assert brought.returncode == 0, brought.stderr
    assert [model.name for model in sessions.read(models.all)] == ["first", "mine"]


def test_a_gated_model_is_fetched_by_whoever_may_at_the_very_commit_that_is_named(
    settings: Settings, sessions: Sessions, served: Hub, checkpoint: Path
) -> None:
    commit = served.publish("acme/tiny", checkpoint)
    (checkpoint / "config.json").write_text("{}")
    served.publish("acme/tiny", checkpoint)
    served.gated.add("acme/tiny")
    pinned = f"hf:acme/tiny@{commit}"
    said = refusal(store(settings, served, "add", "mine", pinned))
    assert said == (
        f"neural-mri: acme/tiny is gated: agree to its terms at {served.endpoint}/acme/tiny, and set "
        "HF_TOKEN to a token that may read it"
    )
    done = store(settings, served, "add", "mine", pinned, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    model = sessions.read(models.get, "mine")
    assert model is not None
    assert model.source == pinned
    assert model.architecture.n_layers == 3


def test_what_the_hub_does_not_have_is_said_in_a_sentence(
    settings: Settings, served: Hub, checkpoint: Path
) -> None:
    served.publish("acme/tiny", checkpoint)
    nobody = refusal(store(settings, served, "add", "mine", "hf:acme/other"))
    assert nobody == (
        f"neural-mri: {served.endpoint} has no model acme/other, or none that is shown without a token "
        "that may read it (HF_TOKEN)"
    )
    unknown = refusal(store(settings, served, "add", "mine", "hf:acme/tiny@v9"))
    assert unknown.startswith("neural-mri: acme/tiny has no revision 'v9': expected a branch")


def test_a_model_that_could_not_be_read_is_refused_before_its_weights_are_fetched(
    settings: Settings, served: Hub, checkpoint: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    served.publish("acme/wordless", checkpoint)
    wordless = refusal(store(settings, served, "add", "mine", "hf:acme/wordless"))
    assert "acme/wordless@main#" in wordless
    assert wordless.endswith("holds no tokenizer.json")
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    served.publish("acme/pickled", checkpoint)
    pickled = refusal(store(settings, served, "add", "mine", "hf:acme/pickled"))
    assert pickled.endswith(
        "holds pytorch_model.bin: only safetensors are fetched, because other formats can hold code"
    )
    assert served.taken() == set()


def test_a_hub_that_is_away_or_may_not_be_asked_is_named(settings: Settings, served: Hub) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    away = refusal(store(settings, served, "add", "mine", "hf:acme/tiny", HF_ENDPOINT=nowhere))
    assert away.startswith(f"neural-mri: {nowhere} does not answer for acme/tiny@main: ")
    offline = refusal(store(settings, served, "add", "mine", "hf:acme/tiny", HF_HUB_OFFLINE="1"))
    assert offline == (
        "neural-mri: acme/tiny@main is not in the cache, and HF_HUB_OFFLINE keeps us from asking "
        f"{served.endpoint}"
    )
    assert served.asked == []


def test_a_download_that_breaks_off_goes_on(
    settings: Settings, served: Hub, checkpoint: Path
) -> None:
    served.publish("acme/tiny", checkpoint)
    served.breaks = 1
    done = store(settings, served, "add", "mine", "hf:acme/tiny")
    assert done.returncode == 0, done.stderr
    assert served.breaks == 0
    assert done.stderr.count("download_broke_off") == 1
    assert len([path for path in served.asked if path.endswith("/model.safetensors")]) >= 2


def test_a_password_of_the_hubs_address_is_told_nobody(settings: Settings, served: Hub) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    for secret in ("ada:lovelace", "hf_lovelace"):
        mirror = f"http://{secret}@{nowhere}"
        away = store(settings, served, "add", "mine", "hf:acme/tiny", HF_ENDPOINT=mirror)
        assert refusal(away).startswith(f"neural-mri: http://***@{nowhere} does not answer for ")
        assert "lovelace" not in away.stdout + away.stderr


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("hf:acme/tiny", Repository("acme/tiny", "main", None)),
        ("hf:gpt2@v1.0", Repository("gpt2", "v1.0", None)),
        ("hf:acme/tiny@refs/pr/4", Repository("acme/tiny", "refs/pr/4", None)),
        (f"hf:acme/tiny@{COMMIT}", Repository("acme/tiny", COMMIT, COMMIT)),
        (f"hf:acme/tiny@v2#{COMMIT}", Repository("acme/tiny", "v2", COMMIT)),
    ],
)
def test_a_repository_reads_back_as_it_was_written(text: str, repository: Repository) -> None:
    assert Repository.parsed(text) == repository
    assert Repository.parsed(repository.label) == repository


@pytest.mark.parametrize(
    "text", ["hf:", "hf:a/b/c", "hf:acme/tiny@", "hf:https://hf.co/a/b", "hf:../x y"]
)
def test_what_is_no_repository_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected hf:ORG/REPO"):
        Repository.parsed(text)

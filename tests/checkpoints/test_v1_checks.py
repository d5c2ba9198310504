"""What `cogview convert --verify` cannot verify is said, file by file."""

import shutil

import pytest

from cogview.checkpoints.registry import V1_FILES
from cogview.checkpoints.v1_checks import unverified_in_folder, unverified_in_v1

NO_CHECKSUMS = "carries no checksums, so damage that happened before the conversion does not show"


def facts_of(files):
    return list(unverified_in_v1(files["source"], files["image_tokenizer"], files["text_model"]))


@pytest.mark.parametrize("legacy", [False, True])
def test_unverified_in_v1_names_files_without_checksums(small_release, tmp_path, legacy):
    """Files older than PyTorch's zip layout were called verified, though a changed weight in them cannot show."""
    files = small_release.write(tmp_path, legacy=legacy)
    shard = files["source"] / "50000" / "mp_rank_00_model_states.pt"
    expected = [shard, files["image_tokenizer"], files["text_model"]] if legacy else [files["text_model"]]
    assert facts_of(files)[: -len(files)] == [f"{name} {NO_CHECKSUMS}" for name in expected]


def test_unverified_in_v1_names_copies_in_other_shards(small_release, tmp_path):
    files = small_release.write(tmp_path, shards=2)
    first, second = (files["source"] / "50000" / f"mp_rank_0{rank}_model_states.pt" for rank in range(2))
    assert f"{second} holds copies of tensors that were read from {first}; the copies were not read" in facts_of(files)


def test_unverified_in_v1_compares_published_checksums(small_release, tmp_path):
    """A text model under a published name is another one."""
    files = small_release.write(tmp_path)
    files["text_model"] = shutil.copyfile(files["text_model"], tmp_path / V1_FILES["text_model"])
    assert facts_of(files)[-3:] == [
        f"no published checksum is known for {files['source'].name}",
        f"no published checksum is known for {files['image_tokenizer'].name}",
        f"{files['text_model']} differs from the published file of that name",
    ]


def test_unverified_in_folder_names_the_weights(tmp_path):
    assert list(unverified_in_folder(tmp_path)) == [f"{tmp_path}/model.safetensors {NO_CHECKSUMS}"]

"""Too small a budget is refused before packing; what a pack lacks of its config is told in a sentence."""

import pytest
from families import make_config
from family_runs import save_random_model

from moe_offload.errors import BudgetError, ConfigError, PackCorruptError, SourceError
from moe_offload.offload.model import OffloadedModel
from moe_offload.offload.pack.packer import pack_model


@pytest.fixture
def checkpoint(tmp_path):
    return save_random_model(make_config("mixtral", hidden_size=64, intermediate_size=64), tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "formats", [{"format": "nf4"}, {"format": "mixed:4"}, {"format": "source"}, {"dense_format": "int8"}]
)
def test_too_small_a_budget_is_refused_before_packing(checkpoint, tmp_path, formats):
    options = {"device": "cpu", "pack_dir": tmp_path / "pack", "context_tokens": 64, "dtype": "float32"} | formats
    with pytest.raises(BudgetError) as foreseen:
        OffloadedModel.from_pretrained(checkpoint, ram="1MiB", **options)
    assert not (tmp_path / "pack").exists(), "nothing is packed for a budget that cannot do"
    with OffloadedModel.from_pretrained(checkpoint, ram="1GiB", **options):
        pass
    with pytest.raises(BudgetError) as known:
        OffloadedModel.from_pretrained(tmp_path / "pack", ram="1MiB", device="cpu", context_tokens=64, dtype="float32")
    assert foreseen.value.needed_bytes == pytest.approx(known.value.needed_bytes, rel=0.01)


def test_a_pack_without_its_config_is_refused_in_a_sentence(checkpoint, tmp_path):
    pack = pack_model(str(checkpoint), tmp_path / "pack", format="nf4")
    (pack / "config.json").unlink()
    with pytest.raises(PackCorruptError, match=r"config\.json"):
        OffloadedModel.from_pretrained(pack, device="cpu")


def test_a_damaged_tokenizer_is_named(checkpoint, tmp_path):
    pack = pack_model(str(checkpoint), tmp_path / "pack", format="nf4")
    (pack / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="tokenizer"):
        OffloadedModel.from_pretrained(pack, device="cpu")


def test_a_home_folder_of_nobody_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nobody-of-this-name"):
        OffloadedModel.from_pretrained("~nobody-of-this-name/model", device="cpu")

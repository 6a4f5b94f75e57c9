"""What cannot be used is refused in one line that says what is wrong and what to do."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from com_pt_tiny import clip, clip_chain, clip_data, llama_settings, spec, task_of

from com_pt.errors import ChainOrderError, GrowthError
from com_pt.method.growth import check_weights
from com_pt.training.chain import load_chain, parse_chain
from com_pt.training.data.captions import CaptionData
from com_pt.training.data.loading import Batches
from com_pt.training.run import run_chain
from com_pt.training.tasks.clip import ClipTask
from com_pt.training.tasks.registry import task_class
from com_pt.training.trainer import StageTrainer
from effml_common.errors import ConfigError, InputError, NonFiniteError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "no stages; list at least one"),
        ({"learning_rate": 1}, "no setting learning_rate; "),
        ({"betaz": [0.9]}, "no setting betaz; did you mean betas"),
        ({"lr": "fast"}, "lr is 'fast'; give a number"),
        ({"lr": 0}, r"lr is 0\.0; try"),
        ({"betas": 0.9}, r"betas are 0\.9; give two"),
        ({"growth": "big"}, "growth is big; use one of embed"),
        ({"depth": "tower"}, "depth is tower; use one of"),
        ({"precision": "int8"}, "precision is int8; use one of"),
        ({"cap": "yes"}, "cap is yes; use one of"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5; give a number"),
        ({"grad_checkpointing": "False"}, "grad_checkpointing is 'False'; give true or false"),
        ({"accum_freq": 0}, "accum_freq is 0; give 1"),
        ({"epochs": -1}, r"epochs are -1\.0; give more"),
        ({"task": "clipp"}, "no task clipp; did you mean clip"),
        ({"task": "nowhere:Task"}, "task nowhere:Task cannot be imported"),
        ({"task": "json:loads"}, "json:loads is no Task; derive"),
        (
            {"task": "com_pt.training.tasks.base:Task"},
            "lacks __getitem__, __len__, build, features, load, loss, macs, save;",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(pictures, change, message) -> None:
    document = {**clip_chain(pictures, 32), **change}
    with pytest.raises(ConfigError, match=message):
        task_class(parse_chain(document).task)(document["data"])


def test_a_chain_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read as YAML: .*cc3m-vit-tsbl"):
        load_chain(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="no list of stages; see"):
        load_chain(tmp_path / "list.yaml")


def test_missing_epochs_follow_the_linear_rule() -> None:
    stages = [{"name": str(i), "model": "x"} for i in range(4)]
    chain = parse_chain({"task": "clip", "stages": stages, "individual_epochs": 128})
    assert [chain.epochs_of(i) for i in range(4)] == [128, 25, 20, 16]


def test_a_chain_that_does_not_ascend_is_refused(pictures, tmp_path) -> None:
    with pytest.raises(ChainOrderError, match=r"W32 has .* fewer than W64 with"):
        run_chain(parse_chain(clip_chain(pictures, 64, 32)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_width_that_is_no_multiple_of_its_heads_is_refused() -> None:
    with pytest.raises(GrowthError, match="image width 40 is no multiple of the head width 16"):
        ClipTask({}).build(spec(40, text=32))


def test_no_data_is_an_error_and_never_a_synthetic_set(tmp_path) -> None:
    with pytest.raises(InputError, match="no train data are given; name a CSV, TSV or tar"):
        len(ClipTask({}))
    document = {"task": "classify", "stages": [{"name": "A", "model": "vit_tiny_patch16_224"}]}
    with pytest.raises(InputError, match="no train data are given; name a CSV"):
        run_chain(parse_chain(document), tmp_path / "out")
    pytest.importorskip("transformers")
    document = {"task": "causal-lm", "stages": [{"name": "A", "model": llama_settings()}]}
    with pytest.raises(InputError, match="no train data are given; name text files"):
        run_chain(parse_chain(document), tmp_path / "out2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no header with a path and captions; add one"),
        ("path\tone\n", "holds no samples; give a file with some"),
        ("path\tone\n0.png\tred\textra\n", "line 2: 3 columns, not 2"),
        ("path\tone\n0.png\tred\nnone.png\tred\n", r"line 3: none\.png is not there"),
        ("path\tone\n0.png\t \n", "line 2: .*no caption"),
    ],
)
def test_a_wrong_table_names_its_line(pictures, content, message) -> None:
    (pictures / "captions.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        len(task_of(pictures, captions=1))


def test_images_with_too_few_captions_are_refused(pictures) -> None:
    with pytest.raises(InputError, match="an image has 2 captions and 3 are drawn"):
        len(task_of(pictures, captions=3))


def test_an_unreadable_image_is_skipped_counted_and_named_and_many_abort(
    pictures, capsys, monkeypatch
) -> None:
    task = task_of(pictures)
    (pictures / "5.png").write_bytes(b"\x89PNG broken")
    batches = Batches(task, 8, seed=0)
    with pytest.raises(InputError, match=r"1 of 48 samples cannot be read, more than 1 % .*5\.png"):
        list(batches.run(0, 6))
    monkeypatch.setattr("com_pt.training.data.loading.TOLERATED_UNREADABLE", 0.05)
    batches = Batches(task, 8, seed=0)
    made = list(batches.run(0, 6))
    assert len(made) == 6
    assert all(images.shape[0] == 8 for images, _ in made)
    assert list(batches.readable.bad) == [5]
    assert "sample 5 is skipped: " in capsys.readouterr().err


def test_batches_do_not_depend_on_processes_or_on_where_they_start(pictures) -> None:
    task = task_of(pictures)
    whole = list(Batches(task, 8, seed=3).run(0, 10))
    later = list(Batches(task, 8, seed=3).run(7, 10))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[7:], later, strict=True))
    halves = [list(Batches(task, 8, seed=3, rank=r, world=2).run(0, 2)) for r in range(2)]
    for step in range(2):
        joined = torch.cat([halves[0][step][0], halves[1][step][0]])
        order = [*range(0, 8, 2), *range(1, 8, 2)]
        assert torch.equal(joined, whole[step][0][order])


@pytest.mark.parametrize(
    ("batch", "world", "message"),
    [
        (64, 1, "48 training samples are fewer than one batch of 64"),
        (9, 2, "a batch of 9 cannot be split over 2 processes"),
        (1, 2, "a batch of 1 cannot be split over 2 processes"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(pictures, batch, world, message) -> None:
    with pytest.raises(InputError, match=message):
        Batches(task_of(pictures), batch, seed=0, world=world)


def test_a_batch_that_does_not_split_into_micro_batches_is_refused(pictures, tmp_path) -> None:
    with pytest.raises(ConfigError, match="a batch of 8 does not split into 1 processes times 3"):
        run_chain(parse_chain(clip_chain(pictures, 32, accum_freq=3)), tmp_path / "out")


def test_half_precision_training_without_a_gpu_is_refused(pictures, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="fp16 needs a GPU; use bf16 or fp32"):
        run_chain(parse_chain(clip_chain(pictures, 32, precision="fp16")), tmp_path / "out")


def test_webdataset_shards_are_read_as_their_own_writer_wrote_them(pictures, tmp_path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shard = tmp_path / "shard-000000.tar"
    with (
        open(pictures / "captions.tsv", newline="") as file,
        webdataset.TarWriter(str(shard)) as tar,
    ):
        for row in list(csv.reader(file, delimiter="\t"))[1:]:
            picture = (pictures / row[0]).read_bytes()
            tar.write({"__key__": row[0][:-4], "png": picture, "json": {"captions": row[1:]}})
    table = CaptionData.open(clip_data(pictures), "train", captions=None)
    tar = CaptionData.open({**clip_data(pictures), "train": str(shard)}, "train", captions=None)
    assert tar.texts == table.texts
    torch.manual_seed(1)
    first = table[3]
    torch.manual_seed(1)
    assert torch.equal(first[0], tar[3][0])
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(InputError, match="is no WebDataset shard"):
        CaptionData.open({**clip_data(pictures), "train": str(shard)}, "train", captions=None)


def test_a_csv_is_read_like_a_tsv(pictures) -> None:
    text = (pictures / "captions.tsv").read_text().replace("\t", ",")
    (pictures / "captions.csv").write_text(text)
    data = {**clip_data(pictures), "train": str(pictures / "captions.csv")}
    ours = CaptionData.open(data, "train", captions=None)
    assert ours.texts == CaptionData.open(clip_data(pictures), "train", captions=None).texts


def test_labels_that_are_no_classes_are_refused(pictures) -> None:
    from com_pt.training.tasks.classify import ClassifyTask

    (pictures / "labels.csv").write_text("path,label\n0.png,0\n1.png,7\n")
    with pytest.raises(InputError, match="line 3: the label '7' is no number below 3"):
        len(ClassifyTask({"train": str(pictures / "labels.csv"), "classes": 3}))


def test_a_quantised_source_is_refused_and_a_nan_in_given_weights_is_bad_input() -> None:
    state = clip(32).state_dict()
    check_weights(state)
    name = "visual.conv1.weight"
    with pytest.raises(GrowthError, match=f"{name} is torch.int8; grow from an unquantised"):
        check_weights({**state, name: (state[name] * 100).to(torch.int8)})
    with pytest.raises(InputError, match="holds NaN or infinity; use an earlier checkpoint"):
        check_weights({**state, name: state[name] * float("inf")})


def test_fp16_that_skips_three_updates_in_a_row_stops(pictures, tmp_path) -> None:
    """The scaler of a GPU run is played by its one flag, and a good update resets it."""
    chain = parse_chain(clip_chain(pictures, 32))
    task = task_of(pictures)
    trainer = StageTrainer(task, chain, chain.stages[0], clip(32), None, 1)
    trainer.accelerator = SimpleNamespace(scaler=object(), optimizer_step_was_skipped=True)
    for step in (1, 2):
        trainer._count_skips(step, tmp_path)
    trainer.accelerator.optimizer_step_was_skipped = False
    trainer._count_skips(3, tmp_path)
    trainer.accelerator.optimizer_step_was_skipped = True
    for step in (4, 5):
        trainer._count_skips(step, tmp_path)
    with pytest.raises(NonFiniteError, match="fp16 skipped 3 updates in a row at step 6"):
        trainer._count_skips(6, tmp_path)
    assert trainer.skipped == 5


def test_sizes_of_data_come_from_the_models_and_must_agree_with_them(pictures) -> None:
    data = {k: v for k, v in clip_data(pictures).items() if "size" not in k and "length" not in k}
    task = ClipTask(data)
    task.adopt({"A": spec(32), "B": spec(64)})
    image, tokens = task[0]
    assert image.shape == (3, 8, 16)
    assert tokens.shape == (2, 8)
    with pytest.raises(
        ConfigError, match=r"image_size of A is .8, 16. and the data are made for 224"
    ):
        ClipTask({**data, "image_size": 224}).adopt({"A": spec(32)})
    with pytest.raises(ConfigError, match="context_length of B is 9 and the data are made for 8"):
        ClipTask(data).adopt({"B": spec(64, length=9), "A": spec(32)})
    with pytest.raises(ConfigError, match="vocab_size of A is 8 and the tokenizer has 9 tokens"):
        ClipTask(data).adopt({"A": spec(32, vocab=8)})

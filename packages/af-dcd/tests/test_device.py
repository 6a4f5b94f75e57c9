"""Which device each command computes on, and that nothing on the way asks another one."""

import pytest
import torch
from torch import nn

import af_dcd.commands.bench
from af_dcd import omni_contrastive_loss
from af_dcd.cli import COMMANDS
from af_dcd.commands._peak_memory import extra_bytes
from af_dcd.config import BenchConfig, DistillConfig, PairConfig, TrainConfig
from af_dcd.method.contrast import pair_mask
from af_dcd.method.distillation import AfDCDLoss
from effml_common.cli import main
from effml_common.errors import ConfigError, InputError

CUDA_1 = torch.device("cuda", 1)


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main("af-dcd", "af-dcd", COMMANDS, [str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", ["demo", "train", "eval", "bench"])
def test_every_command_that_computes_refuses_a_missing_device_in_one_line(
    command, tmp_path, capsys
) -> None:
    words = {
        "demo": [], "bench": [], "train": ["--student", "a.py"], "eval": ["a.py", "a.pth"],
    }[command]  # fmt: skip
    words = [command, *words, "--out", tmp_path / "out", "--device"]
    assert "device cuda:77 is not there" in refused(capsys, *words, "cuda:77")
    assert "device 'gpu' is unknown; use auto" in refused(capsys, *words, "gpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_one_device_for_the_processes_of_a_launcher_is_refused(device) -> None:
    with pytest.raises(ConfigError, match=f"device {device} does not go with launcher slurm"):
        TrainConfig(student="a.py", launcher="slurm", device=device)


def test_train_and_eval_compute_on_the_cpu_where_mmengine_would_take_a_card(
    pair, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("mmseg")
    import mmengine.device.utils

    # What mmengine decides at import where there is a card; its Runner would move the model there.
    monkeypatch.setattr(mmengine.device.utils, "DEVICE", "cuda")
    out = tmp_path / "run"
    method = ["--method", "groups=4", "pool=1", "--iters", "1", "--device", "cpu"]
    words = ["train", *pair.words(), *method, "--out", str(out)]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0
    assert "device: cpu" in capsys.readouterr().err

    monkeypatch.setattr(mmengine.device.utils, "DEVICE", "cuda")
    words = ["eval", str(out / "student.py"), str(out / "student.pth"), "--device", "cpu"]
    assert main("af-dcd", "af-dcd", COMMANDS, [*words, "--out", str(tmp_path / "eval")]) == 0


def test_mmengine_computes_on_the_chosen_kind_of_device(monkeypatch) -> None:
    pytest.importorskip("mmseg")
    import mmengine.device

    from af_dcd.adapters.mmseg.runner import use_device

    monkeypatch.setattr(mmengine.device.utils, "DEVICE", "cpu")
    use_device(torch.device("cuda", 1))  # the index is torch's current device
    assert mmengine.device.get_device() == "cuda"
    monkeypatch.setattr(mmengine.device, "get_device", lambda: "npu")
    with pytest.raises(InputError, match="this mmengine computes on npu alone, not on cpu"):
        use_device(torch.device("cpu"))


def test_mixed_precision_and_cluster_launchers_ask_the_chosen_device(pair, tmp_path) -> None:
    pytest.importorskip("mmseg")
    from af_dcd.adapters.mmseg.config_builder import build_config, fit_to_device

    given = {"student": str(pair.student), "teacher": str(pair.teacher)}
    for change, message in (({"amp": "bf16"}, "amp"), ({"launcher": "slurm"}, "launcher slurm")):
        config = build_config(TrainConfig(**given, **change), tmp_path)
        fit_to_device(config, CUDA_1)
        with pytest.raises(InputError, match=f"{message} needs a CUDA device, not cpu"):
            fit_to_device(config, torch.device("cpu"))


class CardCounters:
    """Memory counters of two cards; unless one is named, card 0 answers."""

    def __init__(self) -> None:
        self.now, self.peak = [1000, 50], [9000, 70]

    def reset_peak_memory_stats(self, device=0) -> None:
        self.peak[self.index(device)] = self.now[self.index(device)]

    def memory_allocated(self, device=0) -> int:
        return self.now[self.index(device)]

    def max_memory_allocated(self, device=0) -> int:
        return self.peak[self.index(device)]

    @staticmethod
    def index(device) -> int:
        return device if isinstance(device, int) else device.index


def test_bench_reads_the_peak_memory_of_the_card_that_it_used(monkeypatch) -> None:
    counters = CardCounters()
    monkeypatch.setattr(torch, "get_device_module", lambda device: counters)

    def run() -> None:
        counters.peak = [9000, 450]

    assert extra_bytes(run, CUDA_1) == 400


@pytest.mark.parametrize(("device", "warm_up"), [("cpu", 0), ("cuda:1", 1)])
def test_bench_warms_a_card_up_before_it_reads_the_clock(
    device, warm_up, tmp_path, monkeypatch
) -> None:
    workloads = {name: lambda: None for name in ("contrast, chunked", "contrast, naive")}
    workloads[af_dcd.commands.bench.GENERATOR] = lambda: None
    calls: list[torch.device] = []

    def time_run(run, where) -> float:
        calls.append(where)
        return 1.0 if len(calls) > warm_up * len(workloads) else 100.0

    replaced = {
        "resolve_device": torch.device, "time_run": time_run,
        "build_workloads": lambda *args: workloads, "measure_peak_bytes": lambda case: 1.0,
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(af_dcd.commands.bench, name, value)
    monkeypatch.setattr("effml_common.report.device_name", str)
    report = af_dcd.commands.bench.bench(BenchConfig(device=device, repeats=2, out=str(tmp_path)))
    assert set(calls) == {torch.device(device)}
    assert {v for row in report.rows for v in row.metrics["seconds"]} == {1.0}


def test_the_mask_of_the_contrast_is_built_where_the_maps_are() -> None:
    for negatives in ("cross_group", "all"):
        assert pair_mask(8, 4, negatives, torch.device("meta")).device.type == "meta"


def test_autocast_reaches_the_generator_and_the_losses_stay_in_float32(monkeypatch) -> None:
    torch.manual_seed(0)
    config = DistillConfig(groups=2, pool=1, patch=2, fd_reduction="mean", lambda_fd=1.0)
    branch = AfDCDLoss(4, 8, config)
    seen: list[torch.dtype] = []
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _inputs, output: seen.append(output.dtype))
    student, teacher = torch.randn(2, 4, 4, 4), torch.randn(2, 8, 4, 4)

    torch.manual_seed(1)
    exact = branch(student, teacher)
    assert set(seen) == {torch.float32}
    seen.clear()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        terms = branch(student.bfloat16(), teacher.bfloat16())
    assert seen == [torch.bfloat16] * 3
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.02)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in branch.parameters())


def test_an_arm_of_the_demo_trains_where_its_scenes_lie() -> None:
    pytest.importorskip("mmseg")
    from af_dcd.demo.arms import ARMS
    from af_dcd.demo.data import draw_scenes
    from af_dcd.demo.models import Segmenter
    from af_dcd.demo.training import LabelledPair, Training

    config = PairConfig(student_width=4, teacher_width=4, batch=2)
    scenes = draw_scenes(2, 0).to(torch.device("meta"))
    training = Training(ARMS[-1], LabelledPair(config, Segmenter(4).to("meta"), scenes), 0, 4)
    groups = training.optimizer.param_groups
    assert {p.device.type for group in groups for p in group["params"]} == {"meta"}
    assert {p.device.type for p in training.student.parameters()} == {"meta"}


def test_what_the_demo_trains_once_is_kept_apart_for_each_kind_of_device() -> None:
    pytest.importorskip("mmseg")
    from af_dcd.demo.models import teacher_key

    keys = {teacher_key(PairConfig(), torch.device(kind)) for kind in ("cpu", "cuda", "mps")}
    assert len(keys) == 3
    assert teacher_key(PairConfig(), torch.device("cuda", 0)) == teacher_key(PairConfig(), CUDA_1)


def test_the_step_takes_a_batch_as_it_is_and_gives_the_terms(pair) -> None:
    pytest.importorskip("mmseg")
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from af_dcd.adapters.mmseg.config_builder import build_config
    from af_dcd.adapters.mmseg.optimizer_wrappers import AfDCDOptimWrapper
    from af_dcd.adapters.mmseg.segmentors import distill_step
    from af_dcd.adapters.mmseg.shims import build_model

    method = ("groups=4", "pool=1")
    given = {"student": str(pair.student), "teacher": str(pair.teacher), "method": method}
    config = TrainConfig(**given, allow_untrained_teacher=True)
    torch.manual_seed(0)
    model = build_model(build_config(config, pair.student.parent).model).train()
    model.data_preprocessor = nn.Module()  # would raise if it were called
    labels = torch.randint(3, (2, 1, 32, 32))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each)) for each in labels]
    before = {name: p.clone() for name, p in model.named_parameters()}

    wrapper = AfDCDOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    batch = {"inputs": torch.randn(2, 3, 32, 32), "data_samples": samples}
    terms = distill_step(model, batch, wrapper)
    assert {"loss", "decode.loss_ce", "loss_kd", "loss_fd", "loss_ctr"} <= set(terms)
    moved = {
        n.partition(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }
    assert moved == {"backbone", "decode_head", "afdcd"}


# On a real card.


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["chunked", "naive"])
@pytest.mark.parametrize("negatives", ["cross_group", "all"])
@pytest.mark.parametrize("p", [1, 2])
def test_the_contrast_on_a_card_equals_the_cpu_in_value_and_gradient(p, negatives, impl) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = 2, 64, 32, 32
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    settings = {"groups": 8, "pool": 2, "tau": 0.7, "p": p, "negatives": negatives, "impl": impl}
    values, gradients = [], []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        own = s.to(device, dtype).requires_grad_()
        value = omni_contrastive_loss(own, t.to(device, dtype), **settings)
        (gradient,) = torch.autograd.grad(value, own)
        assert gradient.device.type == device
        values.append(value.detach().cpu().double())
        gradients.append(gradient.cpu().double())
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_card_trains_and_measures_a_pair(amp, pair, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    method = ["--method", "groups=4", "pool=1", "--amp", amp, "--device", "cuda"]
    words = ["train", *pair.words(), *method, "--out", str(out)]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0
    assert "device: cuda" in capsys.readouterr().err
    assert "peak CUDA memory" in (out / "run/report.json").read_text()
    kept = torch.load(out / "student.pth", weights_only=True)["state_dict"]
    assert all(torch.isfinite(v).all() and v.device.type == "cpu" for v in kept.values())
    words = ["eval", str(out / "student.py"), str(out / "student.pth"), "--device", "cuda"]
    assert main("af-dcd", "af-dcd", COMMANDS, [*words, "--out", str(tmp_path / "eval")]) == 0


@pytest.mark.cuda
def test_a_card_runs_the_demo_and_bench(tmp_path, monkeypatch) -> None:
    pytest.importorskip("mmseg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("af_dcd.demo.report.LEAST_TEACHER_LEAD", -100.0)
    small = "--teacher-steps 4 --teacher-scenes 4 --teacher-width 4 --student-width 4 --scenes 3"
    words = ["demo", *small.split(), "--steps", "3", "--tests", "4", "--batch", "2"]
    words += ["--device", "cuda", "--out", str(tmp_path / "demo"), "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0
    words = ["bench", "--channels", "64", "--student-channels", "8", "--height", "16"]
    words += ["--width", "32", "--device", "cuda", "--out", str(tmp_path / "bench"), "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0

"""The counter counts what a card would do; known operations give known figures."""

import doctest
import gc
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tests.cuda.counter import Counter, HiddenWait
from tests.cuda.fakes import Misplaced

GPU = "cuda:0"


def mean_on_the_host(x: Tensor) -> float:
    """A hidden wait."""
    return x.mean().item()


def test_a_known_chain_gives_known_figures() -> None:
    with Counter(GPU) as counter:
        x = torch.randn(64, 128, device=GPU)
        weight = torch.randn(256, 128, device=GPU)
        with counter.counting() as cost:
            y = F.relu((x @ weight.T).view(64, 16, 16))
            y += 1
    assert cost.launch_count == 3  # product, relu, add; transposing and viewing are free
    product = 4 * (64 * 128 + 256 * 128), 4 * 64 * 256
    assert (cost.read, cost.written) == (product[0] + 2 * product[1], 3 * product[1])
    assert cost.flops == {"float32": 2 * 64 * 128 * 256}
    assert cost.peak == sum(product) + product[1]
    assert not cost.copies
    assert not cost.waits


def test_memory_that_is_freed_does_not_add_to_the_peak() -> None:
    with Counter(GPU) as counter:
        x = torch.zeros(1000, device=GPU)
        with counter.counting() as cost:
            for _ in range(5):
                x = x + 1
    assert cost.peak == 2 * 4000


def test_a_module_is_placed_without_memory_and_stays_tied() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        model[1].weight = model[0].weight
        model.register_buffer("table", torch.zeros(3))
        return model

    with Counter(GPU) as counter:
        model = counter.module(make, torch.bfloat16)
        with counter.counting() as cost:
            pass
    assert {t.device for t in model.state_dict().values()} == {torch.device(GPU)}
    assert model[0].weight is model[1].weight
    assert cost.peak == 2 * (40 + 10 + 3)


def test_a_device_mismatch_raises() -> None:
    with Counter(GPU), pytest.raises(Misplaced, match=r"cuda:0 and cpu"):
        torch.zeros(4, 4, device=GPU) + torch.eye(4)


def test_a_hidden_item_is_found_and_located() -> None:
    where = r"test_counter\.py:mean_on_the_host, line \d+"
    with (
        Counter(GPU) as counter,
        counter.counting() as cost,
        pytest.raises(HiddenWait, match=where),
    ):
        mean_on_the_host(torch.zeros(3, device=GPU))
    assert cost.waits == {"test_counter.py:mean_on_the_host": 1}


def test_a_wait_that_is_allowed_by_name_returns_its_value_and_is_counted() -> None:
    allow = {"test_counter.py:mean_on_the_host": 7.0}
    with Counter(GPU, allow=allow) as counter, counter.counting() as cost:
        assert mean_on_the_host(torch.zeros(3, device=GPU)) == 7.0
    assert cost.waits == {"test_counter.py:mean_on_the_host": 1}


def test_a_list_of_numbers_is_one_wait() -> None:
    def numbers() -> list[float]:
        return torch.zeros(3, device=GPU).tolist()

    allow = {"test_counter.py:numbers": 2.0}
    with Counter(GPU, allow=allow) as counter, counter.counting() as cost:
        assert numbers() == [2.0, 2.0, 2.0]
    assert cost.waits == {"test_counter.py:numbers": 1}


def test_numbers_that_live_on_the_host_are_no_wait() -> None:
    with Counter(GPU) as counter, counter.counting() as cost:
        assert torch.tensor(3.0).item() == 3.0
    assert not cost.waits


@pytest.mark.parametrize(
    ("rows_of", "shape"),
    [
        (lambda x: (x > 0).nonzero(), (5, 2)),
        (lambda x: torch.where(x > 0)[0], (5,)),
        (lambda x: x[x > 0], (5,)),
        (lambda x: x[x[:, 0] > 0], (5, 3)),
    ],
    ids=["nonzero", "where", "mask", "mask of rows"],
)
def test_a_size_that_depends_on_values_is_a_wait(rows_of, shape) -> None:
    def positions() -> Tensor:
        return rows_of(torch.zeros(4, 3, device=GPU))

    with Counter(GPU) as counter, counter.counting(), pytest.raises(HiddenWait):
        positions()
    allowed = Counter(GPU, allow={"test_counter.py:positions": 5})
    with allowed as counter, counter.counting() as cost:
        assert positions().shape == shape
    assert cost.waits.total() == 1


def test_writing_through_a_mask_waits_unless_it_writes_one_number() -> None:
    with Counter(GPU) as counter:
        x = torch.zeros(4, 3, device=GPU)
        with counter.counting() as cost:
            x[x > 0] = 1.0
        assert not cost.waits
        with counter.counting() as cost:
            x[x > 0] = torch.zeros((), device=GPU)
        assert cost.waits.total() == 1


def test_copies_are_located_and_only_blocking_ones_wait() -> None:
    def fetch(x: Tensor) -> Tensor:
        return x.cpu()

    with Counter(GPU) as counter:
        x, host = torch.zeros(3, device=GPU), torch.zeros(3)
        with counter.counting() as cost:
            host.to(GPU, non_blocking=True)
            host.pin_memory().to(GPU, non_blocking=True)
            x.copy_(host, non_blocking=True)
        assert cost.copies.total() == 3
        assert not cost.waits
        with counter.counting() as cost:
            fetch(x)
            host.to(GPU)
            x.copy_(host)
            torch.tensor([1.0], device=GPU)
            x[torch.tensor([0, 1])]
    assert cost.copies["to host test_counter.py:fetch"] == 1
    assert cost.copies.total() == cost.waits.total() == 5
    assert cost.launch_count == 1  # the lookup; a copy between host and device is none


@pytest.mark.parametrize(
    ("solve", "waits"),
    [
        (torch.linalg.cholesky, 1),
        (torch.linalg.inv, 1),
        (torch.linalg.eigh, 1),
        (torch.cholesky_inverse, 1),
        (torch.linalg.cholesky_ex, 0),
        (torch.linalg.inv_ex, 0),
    ],
)
def test_the_error_checks_of_linalg_wait(solve, waits) -> None:
    with Counter(GPU) as counter, counter.counting() as cost:
        solve(torch.zeros(4, 4, device=GPU))
    assert (cost.waits.total(), cost.launch_count) == (waits, 2)  # making the zeros is one launch


def test_synchronize_is_a_wait_where_there_is_no_card() -> None:
    with Counter(GPU) as counter, counter.counting() as cost:
        torch.cuda.synchronize(GPU)
    assert cost.waits == {"test_counter.py:test_synchronize_is_a_wait_where_there_is_no_card": 1}


def test_a_lookup_reads_its_rows_and_not_the_table() -> None:
    with Counter(GPU) as counter:
        table = torch.zeros(100_000, 8, device=GPU)
        tokens = torch.zeros(5, dtype=torch.long, device=GPU)
        with counter.counting() as cost:
            F.embedding(tokens, table)
    assert (cost.read, cost.written) == (5 * 8 * 4 + 5 * 8, 5 * 8 * 4)


@pytest.mark.parametrize("device", [GPU, "gpu:0"])
def test_a_tensor_of_given_numbers_is_copied_whatever_device_was_counted_before(device) -> None:
    with Counter("gpu:0"):  # registers a device, after which torch believes one to be there
        pass
    with Counter(device) as counter, counter.counting() as cost:
        torch.tensor([1.0], device=device)
    assert cost.copies.total() == cost.waits.total() == 1


@pytest.mark.parametrize("device", ["gpu:0", "cpu", "meta"])
def test_backward_and_the_optimizer_are_counted(device) -> None:
    with Counter(device) as counter:
        model = counter.module(lambda: nn.Linear(8, 4, bias=False))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        x = torch.zeros(2, 8, device=device)

        def step() -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # makes the optimizer's state
        with counter.counting() as cost:
            step()
    # Forward: product, square, mean. Backward: fill, divide, power, two products. Two for AdamW.
    product = 2 * 2 * 8 * 4
    assert cost.flops == {"float32": 2 * product}
    assert 8 <= cost.launch_count <= 11
    weights, gradients, moments = 128, 128, 2 * 128
    assert cost.peak >= weights + gradients + moments + 64
    assert not cost.waits


def test_lists_of_tensors_are_clipped_and_updated_in_few_launches() -> None:
    def launches(layers: int) -> int:
        with Counter("gpu:0") as counter:
            model = counter.module(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]))
            optimizer = torch.optim.AdamW(model.parameters())
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with counter.counting() as cost:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        return cost.launch_count - 4 * layers  # the state: two moments of each parameter

    assert launches(20) - launches(2) <= 2 * 18


def test_autocast_of_the_cpu_counts_in_bfloat16() -> None:
    with Counter("cpu") as counter:
        model = counter.module(lambda: nn.Linear(8, 4))
        with counter.counting() as cost, torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(2, 8)).sum().backward()
    assert cost.flops == {"bfloat16": 2 * (2 * 2 * 8 * 4)}


def test_float32_products_may_use_tf32() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with Counter(GPU) as counter, counter.counting() as cost:
            torch.zeros(2, 2, device=GPU) @ torch.zeros(2, 2, device=GPU)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert cost.flops == {"tf32": 16}


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_one_call_whose_memory_is_linear_in_length(masked) -> None:
    def peak(length: int) -> int:
        with Counter(GPU) as counter:
            q = torch.zeros(1, 8, length, 64, device=GPU, dtype=torch.bfloat16)
            mask = (
                torch.zeros(1, 1, 1, length, device=GPU, dtype=torch.bfloat16) if masked else None
            )
            with counter.counting() as cost:
                F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        assert cost.launch_count == 1
        assert cost.flops == {"bfloat16": 4 * 8 * length**2 * 64}
        return cost.peak

    assert peak(8192) < 2.1 * peak(4096)


def test_causal_attention_costs_half_and_key_heads_may_be_shared() -> None:
    with Counter(GPU) as counter:
        q = torch.zeros(1, 8, 128, 64, device=GPU, dtype=torch.bfloat16)
        k = torch.zeros(1, 2, 128, 64, device=GPU, dtype=torch.bfloat16)
        with counter.counting() as cost:
            out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert out.shape == q.shape
    assert cost.flops == {"bfloat16": 2 * 8 * 128**2 * 64}


def test_attention_inside_a_module_of_torch_is_one_call_and_has_a_gradient() -> None:
    with Counter("gpu:0") as counter:
        layer = counter.module(lambda: nn.MultiheadAttention(64, 4, batch_first=True))
        x = torch.zeros(2, 16, 64, device="gpu:0", requires_grad=True)
        with counter.counting() as cost:
            layer(x, x, x, need_weights=False)[0].sum().backward()
    products = 3 * 2 * (4 * 32 * 64 * 64)  # qkv and output, forward and twice backward
    assert cost.flops == {"float32": products + (4 + 10) * 2 * 4 * 16**2 * 16}


def test_checkpointed_activations_are_computed_twice_on_meta() -> None:
    from torch.utils.checkpoint import checkpoint

    with Counter("meta") as counter:
        layers = lambda: nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(2)])  # noqa: E731
        model = counter.module(layers)
        x = torch.zeros(2, 8, device="meta", requires_grad=True)
        with counter.counting() as cost:
            checkpoint(model, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    # Two products forward, four backward, and the first again: the second one's result is not needed.
    assert cost.flops == {"float32": 7 * (2 * 2 * 8 * 8)}


def test_a_triton_kernel_behind_a_custom_op_is_one_launch() -> None:
    @torch.library.custom_op("counter_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        raise AssertionError("a fake device launches no kernel")

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    with Counter(GPU) as counter:
        x = torch.zeros(10, device=GPU)
        with counter.counting() as cost:
            twice(x)
    assert (cost.launch_count, cost.read, cost.written) == (1, 40, 40)


def test_launches_are_attributed_to_the_line_that_asked() -> None:
    def work(x: Tensor) -> Tensor:
        return x + 1

    with Counter(GPU) as counter:
        x = torch.zeros(10, device=GPU)
        with counter.counting() as cost:
            work(work(x))
    assert cost.lines == {"test_counter.py:work": 2}


def test_the_example_in_the_docstring_runs() -> None:
    failures, examples = doctest.testmod(sys.modules[Counter.__module__])
    assert examples
    assert not failures


def test_inference_mode_costs_what_no_grad_costs() -> None:
    costs = []
    for mode in (torch.no_grad, torch.inference_mode):
        with Counter(GPU) as counter, mode():
            x, weight = torch.zeros(10, 100, device=GPU), torch.zeros(10, 100, device=GPU)
            with counter.counting() as cost:
                F.dropout(F.linear(x, weight), training=False).t().reshape(-1).half().cpu()
                torch.linalg.cholesky(x @ weight.t())
            costs.append(cost)
    assert costs[0].flops == costs[1].flops == {"float32": 2 * (2 * 10 * 100 * 10)}
    assert costs[0].waits.total() == costs[1].waits.total() == 2
    assert costs[0].launch_count == costs[1].launch_count


def test_what_an_allowed_wait_returns_is_a_launch_with_its_bytes() -> None:
    def rows(x: Tensor, mask: Tensor) -> Tensor:
        return x[mask]

    with Counter(GPU, {"test_counter.py:rows": 50}) as counter:
        x, mask = torch.zeros(100, device=GPU), torch.zeros(100, device=GPU, dtype=torch.bool)
        with counter.counting() as cost:
            rows(x, mask)
    assert cost.launch_count == 1
    assert cost.written == 50 * 4
    assert cost.peak == 400 + 100 + 200


@pytest.mark.parametrize(("name", "device"), [("cuda", "cuda:0"), ("gpu", "gpu:0")])
def test_a_device_without_an_index_is_the_first(name: str, device: str) -> None:
    with Counter(name) as counter:
        x = torch.zeros(3, device=device)
        with counter.counting() as cost:
            x + 1
    assert cost.launch_count == 1


@pytest.mark.parametrize("name", ["cpu:0", "meta:0", "mps", 0])
def test_a_device_that_cannot_be_counted_on_is_refused(name) -> None:
    with pytest.raises(ValueError, match="cuda:0"):
        Counter(name)


class _Norming(torch.optim.Optimizer):
    """Reads the norm of its first gradient at each step."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None):
        return self.param_groups[0]["params"][0].grad.norm().item()


def test_a_wait_inside_somebodys_optimizer_is_counted() -> None:
    with Counter("gpu:0", {"test_counter.py:step": 1.0}) as counter:
        model: Any = counter.module(lambda: nn.Linear(4, 4))
        model(torch.zeros(2, 4, device="gpu:0")).sum().backward()
        with counter.counting() as cost:
            _Norming(model.parameters()).step()
    assert cost.waits == {"test_counter.py:step": 1}


def _foreach(x: Tensor, host: Tensor) -> None:
    torch._foreach_add_([x], [host])


@torch.library.custom_op("tests::two", mutates_args=())
def _two(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@_two.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, host: x + host,
        lambda x, host: _foreach(x, host),
        lambda x, host: _two(x, host),
        lambda x, host: host[torch.zeros(2, dtype=torch.long, device=x.device)],
        lambda x, host: torch.randn(3, device=x.device, generator=torch.Generator()),
    ],
    ids=["sum", "list in place", "custom operation", "table of the host", "generator"],
)
def test_what_a_card_would_refuse_is_refused_and_located(operation) -> None:
    with (
        Counter(GPU) as counter,
        counter.counting(),
        pytest.raises(Misplaced, match=r"test_counter.py:<lambda>|test_counter.py:_foreach"),
    ):
        operation(torch.zeros(4, device=GPU), torch.zeros(4))


def test_copying_a_list_to_the_host_waits_for_each_tensor() -> None:
    with Counter(GPU) as counter:
        device, host = ([torch.zeros(4, device=kind) for _ in range(3)] for kind in (GPU, "cpu"))
        with counter.counting() as cost:
            torch._foreach_copy_(host, device)
    assert cost.copies.total() == cost.waits.total() == 3
    assert cost.launch_count == 0


@pytest.mark.parametrize("show", [str, repr, "{}".format, "loss %s".__mod__])
def test_printing_a_tensor_is_a_wait(show) -> None:
    def log(x: Tensor) -> str:
        return show(x)

    with Counter(GPU, {"test_counter.py:log": 1.0}) as counter:
        x = torch.zeros((), device=GPU)
        with counter.counting() as cost:
            log(x)
    assert cost.waits.total() == 1


@pytest.mark.parametrize("synchronize", [torch.cuda.synchronize, torch.accelerator.synchronize])
def test_every_way_to_synchronize_is_a_wait(synchronize) -> None:
    with Counter(GPU) as counter, counter.counting() as cost:
        getattr(sys.modules[synchronize.__module__], synchronize.__name__)()
    assert cost.waits.total() == 1


def test_copying_to_host_memory_that_is_not_pinned_waits_whatever_it_is_told() -> None:
    with Counter(GPU) as counter:
        x, host = torch.zeros(3, device=GPU), torch.zeros(3)
        with counter.counting() as cost:
            host.copy_(x, non_blocking=True)
        assert cost.waits.total() == 1
        pinned = torch.zeros(3).pin_memory()
        with counter.counting() as cost:
            pinned.copy_(x, non_blocking=True)
            x.to("cpu", non_blocking=True)
        assert not cost.waits


def test_the_peak_is_that_of_what_was_counted() -> None:
    with Counter(GPU) as counter:
        with counter.counting() as cost:
            torch.zeros(10, device=GPU) + 1
        torch.zeros(1_000_000, device=GPU)
    assert cost.peak == 80


def test_a_storage_that_grows_is_followed() -> None:
    with Counter(GPU) as counter, counter.counting() as cost:
        torch.empty(0, device=GPU).resize_(1000).fill_(1.0)
    assert cost.peak == 4000


TABLE, ROWS = 1000 * 1000 * 4, 100 * 8


@pytest.mark.parametrize(
    ("operation", "read", "written"),
    [
        (lambda x, i, one, row: x.index_put_((i,), one), ROWS + 4, TABLE // 10),
        (lambda x, i, one, row: x.index_put((i,), row), TABLE + ROWS + 4000, TABLE),
        (lambda x, i, *_: x.index_fill_(1, i, 0.0), ROWS, TABLE // 10),
        (lambda x, i, *_: torch.zeros_like(x), 0, TABLE),
        (lambda x, i, *_: x.new_zeros(10), 0, 40),
        (lambda x, i, *_: torch.mul(x, 2, out=x.t()), TABLE, TABLE),
        (lambda x, i, *_: x.unsqueeze_(0), 0, 0),
    ],
    ids=["one value", "out of place", "fill", "like", "new", "out", "view in place"],
)
def test_bytes_are_those_that_a_card_would_move(operation, read, written) -> None:
    with Counter(GPU) as counter:
        x = torch.zeros(1000, 1000, device=GPU)
        i = torch.zeros(100, dtype=torch.long, device=GPU)
        one, row = torch.zeros((), device=GPU), torch.zeros(1, 1000, device=GPU)
        with counter.counting() as cost:
            operation(x, i, one, row)
    assert (cost.read, cost.written) == (read, written)


def test_products_with_vectors_and_of_int8_have_flops() -> None:
    with Counter(GPU) as counter:
        a, x = torch.zeros(32, 64, device=GPU), torch.zeros(64, device=GPU)
        q = torch.zeros(64, 32, dtype=torch.int8, device=GPU)
        with counter.counting() as cost:
            a @ x
            x @ x
            torch._int_mm(q.t(), q)
    assert cost.flops == {"float32": 2 * 32 * 64 + 2 * 64, "int8": 2 * 32 * 64 * 32}


@pytest.mark.parametrize(
    ("heads", "settings"),
    [
        (2, {}),
        (8, {"attn_mask": torch.ones(4, 4, dtype=torch.bool), "is_causal": True}),
        (8, {"attn_mask": torch.ones(4, 4, dtype=torch.long)}),
    ],
    ids=["key heads", "mask and causal", "mask of whole numbers"],
)
def test_attention_that_torch_refuses_is_refused(heads: int, settings: dict[str, Any]) -> None:
    real = [torch.zeros(1, count, 4, 16) for count in (8, heads, heads)]
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*real, **settings)
    with Counter("cpu"):
        fake = [torch.zeros(1, count, 4, 16) for count in (8, heads, heads)]
        if "attn_mask" in settings:
            settings = settings | {
                "attn_mask": torch.zeros(4, 4, dtype=settings["attn_mask"].dtype)
            }
        with pytest.raises(RuntimeError, match="attention"):
            F.scaled_dot_product_attention(*fake, **settings)


def test_a_library_whose_name_begins_like_torchs_has_lines_of_its_own() -> None:
    with Counter(GPU) as counter:
        boxes = torch.zeros(4, 4, device=GPU)
        with counter.counting() as cost:
            torchvision.ops.box_area(boxes)
    assert set(cost.lines) == {"boxes.py:box_area"}


def test_a_counter_that_cannot_be_entered_leaves_nothing_on(monkeypatch) -> None:
    counter = Counter(GPU)
    monkeypatch.setattr(counter, "_patches", lambda: 1 / 0)
    frozen = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), counter:
        pass
    assert gc.get_freeze_count() == frozen
    assert not _get_current_dispatch_mode_stack()
    assert type(torch.zeros(1)) is Tensor

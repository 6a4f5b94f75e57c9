"""Perplexity against closed forms and against the host model's own loss."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effml_common.errors import InputError, NonFiniteError
from sliderquant.adapters.simulation import model_logits
from sliderquant.adapters.text import chunks, default_seqlen, encode
from sliderquant.method.metrics import PIECE, chunk_losses, perplexity


class CountedTensors(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes; views are none."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        storages = {arg.untyped_storage().data_ptr() for arg in given}
        for tensor in filter(torch.is_tensor, out if isinstance(out, tuple | list) else [out]):
            if tensor.untyped_storage().data_ptr() not in storages:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_uniform_model_has_the_vocabularys_perplexity() -> None:
    batches = chunks(torch.randint(50, (640,)), 64, 4)
    assert perplexity(lambda t: torch.zeros(*t.shape, 50), batches) == pytest.approx(50)


def test_perplexity_is_the_exponential_of_the_host_models_mean_loss(loaded, corpus) -> None:
    stream = encode([corpus.code[:10_000]], loaded.tokenizer)
    batches = list(chunks(stream, 64, 7))
    with torch.no_grad():
        losses = [
            loaded.model(input_ids=chunk, labels=chunk).loss.item()
            for chunk in torch.cat(list(batches)).split(1)
        ]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model_logits(loaded.model), batches) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1, 5, 6, 7])
def test_losses_do_not_depend_on_the_pieces_that_logits_come_in(size) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    predicted = torch.log_softmax(logits[:, :-1], dim=-1)
    expected = -predicted.gather(2, tokens[:, 1:, None])[..., 0].mean(dim=1)
    got = chunk_losses(logits.split(size, dim=1), tokens)
    torch.testing.assert_close(got, expected)


def test_no_copy_of_a_whole_chunks_logits_is_made() -> None:
    logits = torch.zeros(1, 4 * PIECE, 64)
    with CountedTensors() as counted:
        perplexity(lambda _: logits, [torch.zeros(1, 4 * PIECE, dtype=torch.long)])
    assert 0 < counted.largest <= PIECE * 64


def test_chunks_do_not_overlap_and_drop_the_tail() -> None:
    got = torch.cat(list(chunks(torch.arange(205), 50, 3)))
    assert torch.equal(got, torch.arange(200).view(4, 50))


def test_text_shorter_than_a_chunk_is_refused() -> None:
    with pytest.raises(InputError, match="49 tokens, fewer than one chunk of 50"):
        chunks(torch.arange(49), 50)


def test_damaged_model_is_no_perplexity() -> None:
    with pytest.raises(NonFiniteError):
        perplexity(lambda t: torch.full((*t.shape, 5), math.nan), [torch.zeros(1, 8).long()])


def test_chunk_length_is_the_literatures_or_the_models_limit() -> None:
    assert (default_seqlen(131072), default_seqlen(512)) == (2048, 512)

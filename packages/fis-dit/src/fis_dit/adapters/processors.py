"""Attention processors: full keys and values for Wan, trimmed text for HunyuanVideo 1.5.

Both take over the attention backend of the processor they replace.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F

from fis_dit.errors import HookStateError

AttentionInput = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class FullKeysProcessor:
    """Wan self-attention with queries from the anchors and keys and values from all frames.

    Args:
        replaced: The processor that serves dense calls.
    """

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced
        self._attention_backend = getattr(replaced, "_attention_backend", None)
        self._parallel_config = getattr(replaced, "_parallel_config", None)
        self._lent: tuple[AttentionInput, nn.Module, Mapping[str, Any]] | None = None

    def lend(self, read: AttentionInput, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Give what the attention's input of all frames is computed from, for one call.

        It is computed in the call: only there are the weights of an offloaded block on its device.

        Args:
            read: Computes the input "b s d" from the two others.
            module: The hooked module.
            arguments: Its arguments by name, for all frames; they may be on another device.
        """
        self._lent = read, module, arguments

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend as WanAttnProcessor does, to the lent keys and values where there are some."""
        # Nothing is lent in a dense step, nor for a clip of two frames.
        if self._lent is None or rotary_emb is None:
            return self.replaced(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        (read, module, arguments), self._lent = self._lent, None
        device = hidden_states.device
        all_frames = read(module, arguments).to(device)
        all_rotary = [table.to(device) for table in arguments["rotary_emb"]]

        # Queries of the anchors, keys and values of all frames.
        if attn.fused_projections:
            width = attn.to_qkv.out_features // 3
            weight, bias = attn.to_qkv.weight, attn.to_qkv.bias
            query = F.linear(hidden_states, weight[:width], bias[:width])
            key, value = F.linear(all_frames, weight[width:], bias[width:]).chunk(2, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            key, value = attn.to_k(all_frames), attn.to_v(all_frames)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))

        # Every token keeps the rotary position that it has in the whole clip.
        out = dispatch_attention_fn(
            _rotate(query, rotary_emb),
            _rotate(key, all_rotary),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(values: Tensor, rotary: Sequence[Tensor]) -> Tensor:
    """Rotate pairs of neighbouring channels; the tables hold every angle twice."""
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    even, odd = values[..., 0::2], values[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return pairs.flatten(-2).type_as(values)


class TrimmedTextProcessor:
    """HunyuanVideo 1.5 attention on the valid text alone, without a mask.

    Valid text comes first, so for one sample this is exact, and it frees the attention backend from the
    (S + T)^2 mask. Padded text tokens come out as zero before their output projection, as they do when
    all of their keys are masked. Reading the number of valid tokens waits for the device once per block.

    Args:
        replaced: The processor whose attention backend is taken over.
    """

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced
        self._attention_backend = getattr(replaced, "_attention_backend", None)
        self._parallel_config = getattr(replaced, "_parallel_config", None)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend as HunyuanVideo15AttnProcessor2_0 does, for one sample.

        Raises:
            HookStateError: If the batch is larger than 1.
        """
        if len(hidden_states) != 1:
            raise HookStateError(
                f"drop_text_padding needs batch 1, not {len(hidden_states)}; turn it off, or run "
                "the two branches of guidance one after the other"
            )
        from diffusers.models.embeddings import apply_rotary_emb

        # Query, key and value of the video.
        valid, padded = int(attention_mask.sum()), encoder_hidden_states.shape[1]
        heads = (attn.heads, -1)
        video = [f(hidden_states).unflatten(2, heads) for f in (attn.to_q, attn.to_k, attn.to_v)]
        video[0], video[1] = attn.norm_q(video[0]), attn.norm_k(video[1])
        for i in (0, 1):
            video[i] = apply_rotary_emb(video[i], image_rotary_emb, sequence_dim=1)

        # The same of the valid text, which has no rotary position.
        words = encoder_hidden_states[:, :valid]
        text = [f(words).unflatten(2, heads) for f in (attn.add_q_proj, attn.add_k_proj)]
        text = [attn.norm_added_q(text[0]), attn.norm_added_k(text[1])]
        text.append(attn.add_v_proj(words).unflatten(2, heads))

        # Joint attention; padded text comes out as zero.
        query, key, value = (torch.cat(pair, 1) for pair in zip(video, text, strict=True))
        out = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(query.dtype)
        video_out, text_out = out.split([hidden_states.shape[1], valid], dim=1)
        text_out = F.pad(text_out, (0, 0, 0, padded - valid))
        return attn.to_out[1](attn.to_out[0](video_out)), attn.to_add_out(text_out)

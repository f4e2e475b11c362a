"""The models of the matrix: how each is built, a batch for it, and the learning rate of its small task.

They are as small as they can be while they keep what makes them the model that they are. Those of transformers are
built from configurations, so nothing is downloaded; it is imported where the first of them is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import networks
import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, ROWS, CLASSES, WIDTH = 29, 12, 4, 5, 32
PAD, START, END = 0, 1, 2
IGNORED = -100  # a label that counts for nothing

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model of the matrix.

    Attributes:
        make: builds the model; the random state is set before.
        draw: draws the batch.
        learning_rate: AdamW's, with which float32 is well on its way after forty steps, and not at zero.
        seed: of weights and batch. Where there are rectifiers, one with which nothing that they get is as near to zero
            as 3e-5: rounding differs by up to 1e-5 behind a batch normalization, and would decide on which side it is.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    learning_rate: float = 2e-3
    seed: int = 0

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.make().train()

    def batch(self) -> Batch:
        return self.draw(torch.Generator().manual_seed(self.seed))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss: transformers' models have it in their output, the others return it."""
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.loss


def tokens(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, length), generator=generator)


def padded(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns tokens and their mask, where the rows after the first end earlier and earlier."""
    mask = torch.arange(LENGTH) < LENGTH - 2 * torch.arange(ROWS)[:, None]
    return tokens(generator).where(mask, PAD), mask.long()


def masked_text(generator: torch.Generator) -> Batch:
    ids, mask = padded(generator)
    hidden = (torch.rand(ids.shape, generator=generator) < 0.3) & mask.bool()
    return {"input_ids": ids.where(~hidden, 3), "attention_mask": mask, "labels": ids.where(hidden, IGNORED)}


def text(generator: torch.Generator) -> Batch:
    ids, mask = padded(generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), IGNORED)}


def unpadded_text(generator: torch.Generator) -> Batch:
    ids = tokens(generator)
    return {"input_ids": ids, "labels": ids}


def text_to_text(generator: torch.Generator) -> Batch:
    ids, mask = padded(generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": tokens(generator, 8)}


def speech(generator: torch.Generator) -> Batch:
    return {"input_features": torch.randn(ROWS, 8, 32, generator=generator), "labels": tokens(generator, 8)}


def translation(generator: torch.Generator) -> Batch:
    return {"source": padded(generator)[0], "target": padded(generator)[0]}


def tagging(generator: torch.Generator) -> Batch:
    ids, mask = padded(generator)
    tags = torch.randint(0, CLASSES, ids.shape, generator=generator)
    return {"tokens": ids, "lengths": mask.sum(1), "tags": tags.where(mask.bool(), IGNORED)}


def images(generator: torch.Generator, side: int = 32, rows: int = 8) -> Tensor:
    return torch.randn(rows, 3, side, side, generator=generator)


def pixel_values(side: int) -> Callable[[torch.Generator], Batch]:
    def draw(generator: torch.Generator) -> Batch:
        labels = torch.randint(0, CLASSES, (8,), generator=generator)
        return {"pixel_values": images(generator, side), "labels": labels}

    return draw


def classified_images(generator: torch.Generator) -> Batch:
    return {"images": images(generator, 16), "classes": torch.randint(0, CLASSES, (8,), generator=generator)}


def segmented_images(generator: torch.Generator) -> Batch:
    # Classes that can be seen, and noise in them that cannot.
    x = images(generator, 16, ROWS)
    seen = (x.sum(1) > 0).long() + 2 * (x[:, 0] > 0).long()
    wrong = torch.rand(seen.shape, generator=generator) < 0.2
    return {"images": x, "classes": seen.where(~wrong, torch.randint(0, CLASSES, seen.shape, generator=generator))}


def boxed_images(generator: torch.Generator) -> Batch:
    centres = torch.rand(ROWS, 3, 2, generator=generator) * 28 + 2
    sides = torch.rand(ROWS, 3, 2, generator=generator) * 16 + 4
    classes = torch.randint(0, CLASSES, (ROWS, 3), generator=generator)
    return {"images": images(generator, 32, ROWS), "boxes": torch.cat([centres, sides], 2), "classes": classes}


def configured(name: str, kind: str, settings: Mapping[str, Any], **how: str) -> Callable[[], nn.Module]:
    """Returns what builds a model of transformers from its configuration, with ``how`` it attends or mixes experts."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**settings)
        return getattr(transformers, f"{name}{kind}")._from_config(config, **how)

    return make


_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
_LAYERS = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_BERT = {**_TOKENS, **_LAYERS, **_NO_DROPOUT, "max_position_embeddings": LENGTH}
_GPT2 = {
    **_TOKENS,
    **{"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": LENGTH},
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
_LLAMA = {**_TOKENS, **_LAYERS, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "use_cache": False}
_MIXTRAL = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
_T5 = {
    **_TOKENS,
    **{"d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": PAD},
}
_VIT = {**_LAYERS, **_NO_DROPOUT, "image_size": 16, "patch_size": 4, "num_labels": CLASSES}
_RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": CLASSES}
_CONVNEXT = {
    **{"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": CLASSES},
    **{"layer_scale_init_value": 0.1},  # with the usual 1e-6 its blocks would do nothing within forty steps
}
_WHISPER = {
    **_TOKENS,
    **{"d_model": WIDTH, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": LENGTH},
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH, "decoder_start_token_id": START},
}
_MAMBA = {**_TOKENS, "hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": 2, "use_cache": False}


def _cases() -> dict[str, Case]:
    causal, generation, classes = "ForCausalLM", "ForConditionalGeneration", "ForImageClassification"
    eager, sdpa = {"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}
    return {
        "bert-eager": Case(configured("Bert", "ForMaskedLM", _BERT, **eager), masked_text),
        "bert-sdpa": Case(configured("Bert", "ForMaskedLM", _BERT, **sdpa), masked_text),
        "gpt2-eager": Case(configured("GPT2", "LMHeadModel", _GPT2, **eager), text),
        "gpt2-sdpa": Case(configured("GPT2", "LMHeadModel", _GPT2, **sdpa), unpadded_text),
        "llama-eager": Case(configured("Llama", causal, _LLAMA, **eager), text),
        "llama-sdpa": Case(configured("Llama", causal, _LLAMA, **sdpa), unpadded_text),
        "t5-eager": Case(configured("T5", generation, _T5, **eager), text_to_text, 5e-4),
        "t5-sdpa": Case(configured("T5", generation, _T5, **sdpa), text_to_text, 5e-4),
        "vit": Case(configured("ViT", classes, _VIT, **sdpa), pixel_values(16), 1e-3),
        "resnet": Case(configured("ResNet", classes, _RESNET), pixel_values(32), 3e-4, seed=3),
        "convnext": Case(configured("ConvNext", classes, _CONVNEXT), pixel_values(32), 1e-3),
        "whisper": Case(configured("Whisper", generation, _WHISPER, **sdpa), speech, 1.5e-3),
        "mamba": Case(configured("Mamba", causal, _MAMBA), unpadded_text),
        "mixtral-eager": Case(configured("Mixtral", causal, _MIXTRAL, **eager, experts_implementation="eager"), text),
        "mixtral-grouped": Case(
            configured("Mixtral", causal, _MIXTRAL, **sdpa, experts_implementation="grouped_mm"), text
        ),
        "transformer": Case(lambda: networks.Translator(VOCABULARY, WIDTH, LENGTH), translation),
        "lstm": Case(lambda: networks.Tagger(VOCABULARY, WIDTH, CLASSES), tagging),
        "unet": Case(lambda: networks.UNet(8, CLASSES), segmented_images),
        "depthwise": Case(lambda: networks.DepthwiseSeparable(16, CLASSES), classified_images, 4e-4, seed=2),
        "yolo": Case(lambda: networks.Detector(8, CLASSES), boxed_images, 1e-3, seed=4),
    }


CASES = _cases()

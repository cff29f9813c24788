"""A tiny vision-language model of transformers, whose weights say what it answers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "user:",
    "assistant:",
    "egg",
    "sausage",
    "none",
    ",",
    ".",
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
WIDTH = 16


def tiny_llava(answer: str) -> tuple[Any, Any]:
    """A LLaVA whose every word is followed by one word: after the prompt it says the answer.

    The layers add nothing to a word's embedding, which is one-hot, and the last layer maps it to
    the word that comes next.
    """
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    square = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
    text = LlamaConfig(
        **sizes,
        vocab_size=len(WORDS),
        num_hidden_layers=1,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        for name, weight in model.named_parameters():
            if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
                weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(len(WORDS), WIDTH))
        said = ["assistant:", *answer.split(), "</s>"]
        head = model.get_output_embeddings().weight.zero_()
        for now, following in itertools.pairwise(said):
            head[WORDS.index(following), WORDS.index(now)] = 9.0
    return model, processor

"""Text models of transformers with random weights, small ones and drawn ones.

`python -m tests.models.text_references` writes the committed fixtures (needs torch and
transformers); the tests of the group `formats` import it for random configurations.
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every weight, so that no name can be swapped without being seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(noise / 10 + (1 if "norm" in name.lower() and "weight" in name else 0))
            elif "embed" in name:
                tensor.copy_(noise / 2)
            else:
                tensor.copy_(noise * (1.5 / tensor.shape[1]) ** 0.5)
    return model.eval()


def bert(head: str, seed: int = 0, style: str = "Bert", **config: Any) -> nn.Module:
    """`head` is "Model", "ForSequenceClassification" or "ForMaskedLM"."""
    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.1,
        "attn_implementation": "eager",
    }
    settings = getattr(transformers, f"{style}Config")(**(small | config))
    return randomize(getattr(transformers, f"{style}{head}")(settings), seed)


def llama(seed: int = 0, **config: Any) -> nn.Module:
    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(small | config))))


def respell_llama(folder: pathlib.Path) -> None:
    """Two shards with what old files have besides, and the configuration as before version 5."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    path.unlink()
    (folder / f"{path.name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    )
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    (folder / "config.json").write_text(json.dumps(config))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def texts(seed: int = 1, rows: int = 3, length: int = 9, vocabulary: int = 40, padding: int = 0):
    """Tokens, a mask of padding on either side or none, and types."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, vocabulary, (rows, length)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[0, length // 2 :] = 0
    mask[-1, : length // 3] = 0
    types = (np.arange(length) >= rng.integers(1, length, (rows, 1))).astype(np.int32)
    return np.where(mask > 0, tokens, padding).astype(np.int32), mask, types


def outputs(model: nn.Module, tokens: Any, mask: Any, types: Any = None) -> torch.Tensor:
    """The logits, or the vectors of a model without a head."""
    given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    told = {k: torch.from_numpy(v).long() for k, v in given.items() if v is not None}
    found = model(**told)
    return found.logits if "logits" in found else found.last_hidden_state


def respell(folder: pathlib.Path) -> None:
    """Names of norms as BERT's first files have them, tied weights twice, a second head."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["cls.predictions.decoder.weight"] = tensors[
        "bert.embeddings.word_embeddings.weight"
    ].clone()
    tensors["bert.pooler.dense.weight"] = torch.eye(16)
    tensors["bert.pooler.dense.bias"] = torch.zeros(16)
    tensors["cls.seq_relationship.weight"] = torch.zeros(2, 16)
    tensors["cls.seq_relationship.bias"] = torch.zeros(2)
    tensors["bert.embeddings.position_ids"] = torch.arange(16)[None]
    for name in [name for name in tensors if "LayerNorm" in name]:
        new = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        tensors[new] = tensors.pop(name)
    save_file(tensors, path, {"format": "pt"})


ROBERTA = {"style": "Roberta", "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}

SMALL = {
    "bert_classes": lambda: bert("ForSequenceClassification", num_labels=3, num_hidden_layers=2),
    "bert_encoder": lambda: bert("Model", type_vocab_size=3, num_attention_heads=4),
    "bert_words": lambda: bert("ForMaskedLM", hidden_act="gelu_new"),
    "roberta_regression": lambda: bert("ForSequenceClassification", num_labels=1, **ROBERTA),
    "roberta_words": lambda: bert("ForMaskedLM", tie_word_embeddings=False, **ROBERTA),
    "llama_tied": lambda: llama(tie_word_embeddings=True, num_hidden_layers=1),
    "llama_scaled": lambda: llama(
        head_dim=6,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3,
        eos_token_id=[2, 3],
        pad_token_id=0,
        bos_token_id=None,
    ),
}


def main() -> None:
    for name, make in SMALL.items():
        folder, model = FIXTURES / name, make()
        model.save_pretrained(folder)
        for extra in folder.glob("generation_config.json"):
            extra.unlink()
        roberta, llama = name.startswith("roberta"), name.startswith("llama")
        tokens, mask, types = texts(padding=1 if roberta else 0)
        given = {"tokens": tokens, "mask": mask}
        if not (roberta or llama):
            given["types"] = types
        with torch.no_grad():
            expected = outputs(model, *given.values()).numpy()
        np.savez_compressed(folder / "expected.npz", **given, outputs=expected)
        if name == "bert_words":
            respell(folder)
        if name == "llama_scaled":
            respell_llama(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("transformers_version", None)
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()

"""Writes the fixtures of this folder: tiny models of transformers with adapters trained by PEFT.

    python tests/formats/make_fixtures.py

needs `torch`, `transformers` and `peft` (the extra `benchmark`), draws every number from a
seed, and saves no pickles: weights as safetensors, inputs and logits as npz.
"""

import json
import pathlib
import tempfile

import numpy as np
import peft
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

BERT_LINEAR = ["query", "key", "value", "attention.output.dense"]
CASES = {
    "bert": {
        "lora": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"]),
        "rslora-patterns": peft.LoraConfig(
            r=4,
            lora_alpha=8,
            use_rslora=True,
            target_modules=BERT_LINEAR,
            rank_pattern={"layer.0.attention.self.query": 6, "^bert.encoder.layer.1.*value": 2},
            alpha_pattern={"attention.output.dense": 3, "layer.1.attention.self.key": 5},
        ),
        "dora": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=BERT_LINEAR),
        "embedding": peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=["word_embeddings", "query"]
        ),
        "dora-embedding": peft.LoraConfig(
            r=3, lora_alpha=6, use_dora=True, target_modules=["word_embeddings"]
        ),
        "head": peft.LoraConfig(
            r=2, lora_alpha=2, target_modules=["query"], modules_to_save=["classifier"]
        ),
        "pissa": peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["query", "value"]
        ),
        "olora": peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights="olora", target_modules=["query", "value"]
        ),
        "adalora": peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, lora_alpha=8, target_modules=["query", "value"]
        ),
        "ia3": peft.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
    },
    "vit": {
        "lora": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        "dora-conv": peft.LoraConfig(
            r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "projection"]
        ),
        "conv-patterns": peft.LoraConfig(
            r=4,
            lora_alpha=4,
            target_modules=["projection", "k_proj", "fc1"],
            rank_pattern={"projection": 2},
            alpha_pattern={"projection": 8},
        ),
    },
}


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    inputs = {"input_ids": torch.randint(0, 40, (3, 9))}
    return BertForSequenceClassification(config), inputs


def vit():
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 12, 12)}


def shake(model, seed):
    """Moves whatever trains, so that no adapter is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))


def logits(model, inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def tensors(model):
    """The state dict as save_file wants it, tied and non-contiguous tensors written out."""
    return {name: value.clone().contiguous() for name, value in model.state_dict().items()}


def clean(folder):
    """Keeps what the format needs: no model card, no path of this machine."""
    for path in folder.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def base_model(family):
    """The tiny model and its inputs, always with the same weights."""
    model, inputs = {"bert": bert, "vit": vit}[family]()
    # The start of transformers is nearly linear; larger weights make the logits tell more.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(8.0)
            elif "norm" not in name.lower():
                p.add_(0.1 * torch.randn_like(p))
    return model, inputs


def write_case(family, case, root, seed):
    """Trains (that is, moves) an adapter with PEFT, writes it to root/case, returns its logits."""
    model, inputs = base_model(family)
    adapted = peft.get_peft_model(model, CASES[family][case])
    converts = case == "pissa"
    with tempfile.TemporaryDirectory() as start:
        if converts:
            # PEFT wants the start on disk, marked as plain LoRA, to convert against.
            adapted.peft_config["default"].init_lora_weights = True
            adapted.save_pretrained(start)
            adapted.peft_config["default"].init_lora_weights = "pissa"
        shake(adapted, seed)
        values = logits(adapted, inputs)
        # Converting changes the adapter that is loaded, so the plain one is written first.
        adapted.save_pretrained(root / case, save_embedding_layers=False)
        clean(root / case)
        if converts:
            target = root / "pissa-converted"
            adapted.save_pretrained(
                target, path_initial_model_for_weight_conversion=start, save_embedding_layers=False
            )
            clean(target)
    return values, inputs


def logits_of_written(family, folder):
    """What PEFT computes with an adapter that lorajax wrote."""
    model, inputs = base_model(family)
    return logits(peft.PeftModel.from_pretrained(model, str(folder)), inputs), inputs


def main(root):
    for family, cases in CASES.items():
        folder = root / family
        folder.mkdir(parents=True, exist_ok=True)
        model, inputs = base_model(family)
        save_file(tensors(model), folder / "base.safetensors")
        arrays = {name: value.numpy() for name, value in inputs.items()}
        arrays["base"] = logits(model, inputs)
        for seed, case in enumerate(cases):
            arrays[case], _ = write_case(family, case, folder, seed)
            if case == "pissa":
                arrays["pissa-converted"] = arrays["pissa"]
        np.savez(folder / "logits.npz", **arrays)
    # Imported here: they read the base that was written above.
    import written_cases

    from lorajax import adapters

    for family, cases in written_cases.CASES.items():
        arrays = {}
        for case in cases:
            target = root / family / "written" / case
            adapters.save_peft(written_cases.make(family, case), target)
            arrays[case], _ = logits_of_written(family, target)
        np.savez(root / family / "written" / "logits.npz", **arrays)


if __name__ == "__main__":
    main(pathlib.Path(__file__).resolve().parent / "fixtures")

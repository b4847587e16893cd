"""The stages of `python -m benchmarks gpu`: what is right on a card, and what a second of it does.

| module | stages |
|---|---|
| `runs` | how a stage runs: in a process and with a budget of its own, written as it goes |
| `rates` | the card, its peak rates by name and as measured, operations of a step |
| `right` | verdicts in float64, adapters, PEFT's fixtures, a sweep that is resumed |
| `lanes` | lanes a second, and the same by torch |
| `steps` | steps of ViT-B/16, BERT-base and SmolLM2-135M, and the same by PEFT; many adapters |
| `attention` | attention by XLA and by cuDNN |
| `trace` | where the time of a step goes |
"""

"""The paper authors' checkpoints: one `torch.save` file of a state dict, in the names of transformers 4.51 and peft.

A name is PREFIX + the name on the hub, where PREFIX is what the released trainer wraps around the model, for example
`module.base_causallm.base_model.model.`.  A module with LoRA has `.base_layer.weight`, `.lora_A.default.weight` (r,in)
and `.lora_B.default.weight` (out,r).  The embeddings appear under a second name (`embedding.weight`), and have one row
for each token of the tokenizer, to which the trainer added `ADDED_TOKENS`.  Source: github.com/FYYDCC/IVT-LR.
"""

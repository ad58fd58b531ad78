"""Everything that is a model on disk.

    families   config.json and weight names of GPT-2, Llama, Qwen; what a new family touches
    weights    tensors in safetensors, every one accounted for
    path       a diffusion path: path.json and its tensors
    state      a training, to be resumed
    hub        downloads, checked and resumed
    web        how one address is asked

May import system.
"""

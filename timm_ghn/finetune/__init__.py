"""Fine-tune a model from a predicted, a random or a pretrained start: ``accelerate launch -m timm_ghn.finetune``."""

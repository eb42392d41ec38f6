"""From pretrained towers, or a whole vision-language model, to a checkpoint; the embedded tiny model."""

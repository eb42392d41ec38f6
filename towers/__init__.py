"""From pretrained towers to a checkpoint; the embedded tiny model."""

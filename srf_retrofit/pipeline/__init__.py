"""From a pretrained model to a distilled one in stages that can be resumed: `run.distill_model`, as `settings` say."""

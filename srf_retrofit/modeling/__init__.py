"""All that a checkpoint needs to run: flat siblings that travel inside it, and import nothing else of the package."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling import FAMILIES

for _family in FAMILIES:
    AutoConfig.register(_family.srf_config.model_type, _family.srf_config, exist_ok=True)
    AutoModel.register(_family.srf_config, _family.srf_model, exist_ok=True)
    AutoModelForCausalLM.register(_family.srf_config, _family.srf_head, exist_ok=True)

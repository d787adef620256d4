"""Bottleneck adapters as a tuner of PEFT. Importing this package makes PEFT know the type `BOTTLENECK`:

    import hotswap_trainer.methods.bottleneck.tuner
    model = PeftModel.from_pretrained(base, "directory")

References: Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2020 (2005.00247) and, for the parallel
layout, He et al. 2021 (2110.04366).
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from hotswap_trainer.methods.bottleneck.tuner.config import PEFT_TYPE, BottleneckConfig
from hotswap_trainer.methods.bottleneck.tuner.layer import Bottleneck, BottleneckLayer
from hotswap_trainer.methods.bottleneck.tuner.model import BottleneckModel


def register() -> None:
    """Make PEFT know the method; what is registered already stays."""
    if PeftType(PEFT_TYPE) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=PEFT_TYPE.lower(),
            config_cls=BottleneckConfig,
            model_cls=BottleneckModel,
            prefix=BottleneckModel.prefix,
        )


register()

__all__ = ["Bottleneck", "BottleneckConfig", "BottleneckLayer", "BottleneckModel", "register"]

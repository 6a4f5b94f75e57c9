"""``com-pt individual``: train one member alone, by the same code as the chain."""

from com_pt.commands.train import train_and_report, with_overrides
from com_pt.config import IndividualConfig
from com_pt.training.chain import load_chain
from effml_common.device import resolve_device
from effml_common.logging import say
from effml_common.report import Report


def individual(config: IndividualConfig) -> Report:
    """Train one member alone."""
    device = resolve_device(config.device)
    whole = with_overrides(load_chain(config.chain), config)
    chain = whole.individual(config.member)

    # Say where the rate comes from: it decides how strong this baseline is.
    stage = chain.stages[0]
    source = (
        "its individual_lr" if stage.individual_lr is not None else f"lr of {whole.stages[0].name}"
    )
    say(f"{config.member} is trained alone with a peak rate of {stage.lr:g} ({source})")
    return train_and_report(config, chain, "individual", device)

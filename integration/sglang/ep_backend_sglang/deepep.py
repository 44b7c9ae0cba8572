"""SGLang's own deepep modes on ep_backend's stand-in for the module ``deep_ep``."""

import sys

DISPATCHER = "sglang.srt.layers.moe.token_dispatcher.deepep"


def hand_over() -> None:
    """A scheduler has imported SGLang's dispatcher before it loads plug-ins; that has looked for ``deep_ep``,
    found none and remembers it. It gets the names now that it imports where it finds one."""
    dispatcher = sys.modules.get(DISPATCHER)
    if dispatcher is None or dispatcher.use_deepep:
        return
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    from ep_backend.compat.deep_ep import Buffer, Config

    vars(dispatcher).update(
        Buffer=Buffer,
        Config=Config,
        sglang_per_token_group_quant_fp8=sglang_per_token_group_quant_fp8,
        use_deepep=True,
    )

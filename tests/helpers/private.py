"""The complete list of private names of diffusers and torch that this package uses.

A new release may move any of them.  A test looks for each and fails with the names that are gone;
:func:`missing` finds the same names when a strange error needs an explanation.
"""

from __future__ import annotations

from importlib import import_module

# module:attributes, where () stands for an instance.
HOOK = (
    "diffusers.hooks:HookRegistry.check_if_exists_or_initialize",
    "diffusers.hooks:HookRegistry.get_hook",
    "diffusers.hooks:HookRegistry.register_hook",
    "diffusers.hooks:HookRegistry.remove_hook",
    "diffusers.hooks:ModelHook.initialize_hook",
    "diffusers.hooks:ModelHook.deinitalize_hook",
    "diffusers.hooks:ModelHook().fn_ref",
    "diffusers.hooks.hooks:HookFunctionReference().original_forward",
    "diffusers:StableDiffusionPipeline._execution_device",
    "diffusers:StableDiffusionPipeline.do_classifier_free_guidance",
    "diffusers:StableDiffusionPAGPipeline._get_pag_scale",
    "diffusers:StableDiffusionPAGPipeline.do_perturbed_attention_guidance",
    "diffusers:StableDiffusion3Pipeline.do_classifier_free_guidance",
    "diffusers:StableDiffusionXLPipeline.do_classifier_free_guidance",
    "diffusers:LTXPipeline._unpack_latents",
    "torch.nn:Module._compiled_call_impl",
)
ATTENTION = (
    "diffusers.models.attention_processor:Attention.norm_encoder_hidden_states",
    "diffusers.models.attention_processor:Attention.set_processor",
    "torch.nn:Module()._modules",
)
# For diffusers 0.36 and newer; earlier guiders had another interface.
GUIDER = (
    "diffusers.guiders.guider_utils:BaseGuidance._identifier_key",
    "diffusers.guiders.guider_utils:BaseGuidance._input_predictions",
    "diffusers.guiders.guider_utils:BaseGuidance.prepare_inputs",
    "diffusers.guiders.guider_utils:BaseGuidance.prepare_inputs_from_block_state",
    "diffusers.guiders.guider_utils:BaseGuidance.prepare_models",
    "diffusers.guiders.guider_utils:BaseGuidance.set_state",
    "diffusers.guiders.guider_utils:GuiderOutput",
    "diffusers.modular_pipelines:BlockState",
    "diffusers.modular_pipelines:InputParam",
    "diffusers.modular_pipelines:LoopSequentialPipelineBlocks.loop_step",
    "diffusers.modular_pipelines:ModularPipelineBlocks.expected_components",
    "diffusers.modular_pipelines.modular_pipeline_utils:InsertableDict.insert",
)
SCHEDULERS = (
    "diffusers.schedulers.scheduling_ddim:DDIMSchedulerOutput",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete:"
    "FlowMatchEulerDiscreteSchedulerOutput",
    "diffusers.utils.torch_utils:randn_tensor",
)
EXACT = (
    "diffusers.models.modeling_outputs:Transformer2DModelOutput",
    "diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput",
)
NAMES = HOOK + ATTENTION + GUIDER + SCHEDULERS + EXACT


def missing(names: tuple[str, ...] = NAMES) -> list[str]:
    """Find the names that do not exist in the installed versions.

    Parameters
    ----------
    names : tuple of str
        ``module:attribute.attribute``; ``attribute()`` stands for an instance of a class.

    Returns
    -------
    list of str
        The missing names.
    """
    return [name for name in names if not _exists(name)]


def _exists(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found = import_module(module)
    except ImportError:
        return False
    for part in path.split("."):
        attribute = part.removesuffix("()")
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
        if part.endswith("()"):
            found = found()
    return True

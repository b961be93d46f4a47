"""Scatterbrain inside Hugging Face transformers. Importing this module is all it takes::

    import scatterbrain as sb
    import scatterbrain.integrations.transformers

    model = AutoModel.from_pretrained(path, attn_implementation="scatterbrain")
    with sb.calibrate(model), torch.no_grad():  # a decoder; an encoder has nothing to calibrate
        model(**batch)

"scatterbrain" is :func:`scatterbrain.presets.drop_in`, in causal layers :func:`scatterbrain.presets.causal`;
"scatterbrain:drop_in" is the same, and "scatterbrain:quality" and "scatterbrain:fast" have the presets of these names
in its place. "scatterbrain:quadratic", "scatterbrain:causal", "scatterbrain:train" and "scatterbrain:paper" are the
presets for all layers, "scatterbrain:full" is exact, and :func:`register` adds names. Choose a name at load, with
``model.set_attn_implementation(name)``, or for single layers with ``sb.replace_attention(model, where=)``.

Every attention layer owns a :class:`scatterbrain.ScatterbrainAttention` as its submodule ``scatterbrain``, so
calibration and learned projections move, copy, save, load and pickle with the model. A layer that is never causal has
none of these by default, and the state dict of the original. Choosing another implementation takes them out of the
state dict; choosing this one again brings them back. A saved model loads under every implementation: a layer takes what
was saved for it if that is whole and of its low-rank kernel, and else starts anew, or goes without where its kernel
needs nothing, which one warning says. Models that were calibrated in all layers run as they did under
"scatterbrain:quadratic". "scatterbrain:full" has nothing to save. An adapter of peft has to be told of learned
projections: ``LoraConfig(..., modules_to_save=["scatterbrain"])``.

Vision transformers (ViT, ViT-MSN, I-JEPA, DeiT, DINOv2, DINOv3, CLIP, SigLIP) run their layers on patches in Hilbert
order wherever the support gains from it, as with ``sb.replace_attention``; outputs are in the model's own order.
``AutoModel.from_pretrained(path, attn_implementation="scatterbrain", scatterbrain_token_order="natural")`` refuses
that, "hilbert" insists on it, and "auto" is the default. It is an attribute of the configuration, saved with it; set
``model.config.scatterbrain_token_order`` before ``set_attn_implementation`` to change it later.

============================================ =======================================================================
call                                         what happens
============================================ =======================================================================
no mask, padding on any side, causal         approximated; outputs of padded queries are zero before the projection
more than 16 tokens behind a cache           approximated, each query at its position in the cache
one token, or up to 16 behind a cache        exact over the cache, so that guessed tokens (speculative decoding) are
                                             verified as they would be written
up to 16 behind a cache, unknown to the      approximated, as more are: behind a static cache on a GPU (unless
call                                         SCATTERBRAIN_CHECK=1 reads its offset) and in every compiled or exported
                                             graph, and behind any cache in a graph for any number of queries, which
                                             torch.compile makes by itself once their number has changed
cross-attention                              approximated, each query with a list of its own, since windows and shared
                                             lists depend on later target tokens, and with the kernel of causal calls
                                             where the other one reads all of them; with LSH and "input" exact
dropout on attention weights in training     exact, warns: :func:`set_attention_dropout`
4-D bool masks of padding and causality      approximated; exact, warns, where they make a layer causal that never is
                                             and its kernel reads the whole sequence, as the default does
sliding windows shorter than the sequence,   exact, warns
packed sequences, other 4-D and float masks
``output_attentions=True``                   warns: there are no weights
score caps, sinks, position biases,          ValueError
head masks, keys chosen by the model
uncalibrated, where the kernel has           ValueError
statistics
families that compute attention themselves   ValueError at load (Bloom, DeBERTa-v2, Falcon, GPT-Neo, Longformer, the
                                             text of GIT, ...)
parts that do so, with a configuration of    exact, warns (the image encoders of SAM and SAM-HQ, audio of Gemma 3n and
their own                                    Gemma 4, ...)
layers that do so beside others              exact (the encoder of BigBird-Pegasus, "prob" attention of Informer); the
                                             others are exact too under torch.compile where a mask is made
============================================ =======================================================================

Under torch.compile and torch.export the same calls are approximated, and a few tokens behind a cache where the table
says so: there a graph's outputs differ from those without it by the approximation. Where neither a mask nor a cache is
passed the graph itself looks whether position ids mark packed sequences, and then runs exactly. 4-D masks are exact in
a graph.
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "scatterbrain.integrations.transformers needs Hugging Face transformers: "
        "pip install 'scatterbrain[transformers]'",
        name="transformers",
    ) from error

from scatterbrain.integrations.dropout import set_attention_dropout
from scatterbrain.integrations.replacer import register_replacer
from scatterbrain.integrations.transformers.hooks import install
from scatterbrain.integrations.transformers.registry import SETTINGS, Settings
from scatterbrain.integrations.transformers.replacer import TransformersReplacer, UpdateStatistics
from scatterbrain.integrations.transformers.settings import register, register_built_in

__all__ = ["SETTINGS", "Settings", "UpdateStatistics", "register", "set_attention_dropout"]

register_built_in()
install()
register_replacer(TransformersReplacer())

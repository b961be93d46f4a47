"""The registered operators. Nothing here computes attention or knows supports and statistics: the operators take lists
and coordinates, and everything that chooses what is read happens before them.

``attention``, ``attention_backward``  the operator and its gradients; ``attention_with_state`` also returns the states
                                       of the low-rank kernel and the scores of listed keys, which the backward pass
                                       then need not compute again (empty where keeping them is not worth their memory)
``route``                              lists from the content
``cluster``                            clusters of the keys, for the centroid kernel
``input_projection``                   projections for the quadratic kernel, fitted to the tokens; on the CPU alone
``project``, ``project_packed``        coordinates from tokens, as a map or as rows that kernels read in place
``quadratic_attention``                projects, routes if ``keys`` > 0, and attends in one call
``prepare``, ``prepare_centroid``      keep all arguments but the tokens, of ``quadratic_attention`` or of attention
                                       that clusters its keys, and return a number for ``prepared_attention``, until
                                       ``discard_prepared``. Where ``sources`` no longer hold the bytes of ``copies``,
                                       from which the projections were made, its results are empty. ``fitted`` are
                                       projections in place of those that were kept

library.py loads them, arguments.py names their arguments; fakes.py, gradients.py, vmap.py and flops.py are what torch
asks for about each. untraced.py calls them below autograd, with nodes of its own; transformed.py calls them under
torch.func; packed.py chooses between exact and approximated rows in a traced graph; unused.py is for what a call
leaves out.
"""

# Loads the operators and registers what torch needs to know of them.
from scatterbrain.operators import fakes, flops, gradients, library, packed, untraced, vmap  # noqa: F401
from scatterbrain.operators.arguments import AttentionArguments, ClusterArguments, QuadraticArguments, RouteArguments

__all__ = ["AttentionArguments", "ClusterArguments", "QuadraticArguments", "RouteArguments"]

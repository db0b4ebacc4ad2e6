"""A golden of every member, by every form, compiled with the optimisations that users have.

All other tests are compiled without (conftest.py): a mistake that XLA's fusions or LLVM bring out,
or cover up, shows here.
"""

import pytest
import test_resfu_parity
import test_upsamplers_parity
from jax._src import compiler

pytestmark = pytest.mark.optimized

# One of each member, small.
GOLDENS = {
    "carafe": "carafe_s2_k5_g1",
    "sapa": "sapa_b_s2_k5",
    "fade": "fade_l2h_s2",
    "dysample": "dysample_lp_s2",
    "lda_aqu": "lda_aqu_s2_nh1",
}


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu"])
@pytest.mark.parametrize("member", GOLDENS)
def test_members(member, implementation):
    test_upsamplers_parity.test_module(GOLDENS[member], implementation, False)


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu"])
def test_resfu(implementation):
    test_resfu_parity.test_module("resfu_s2_k3_gf1", implementation, False)


def test_the_marker_has_an_effect():
    options = dict(compiler.get_compile_options(1, 1).env_option_overrides)
    assert options["xla_backend_optimization_level"] == 3

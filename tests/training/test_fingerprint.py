"""Names for what results depend on."""

import tarfile

import pytest
from golden.test_golden import CHECKPOINTS
from tiny import some_ddpm, tiny_unet

from ddim_pl.noise import GammaNoise, GaussianNoise
from ddim_pl.samplers import DDIM
from ddim_pl.training.fingerprint import fingerprint, fingerprint_of_file
from ddim_pl.training.loading import load

# As version 0.1.0 computed them: pairs and finished cells of before are found by these.
RECORDED = {
    "ddpm": "12fcc443eb1112f232ea9850d05637ec285e348dda27091c77da3c385744ba5b",
    "gamma": "4d010d46ea5d09d47af7aa8e926acec71ea09e45cc6067d03134e3870049eb98",
    "progressive": "d7642a184bae4ff45ec4d17fe5b6cf1bd8c3fa15af13e2fcab27efc115ba38ef",
    "student": "08370a6ba6bd3f75793db096491612eb68162c4cc84a536e79c807e283703db9",
    "luhman": "e54fcf54856ff9e79db0e337bd51f7e3d28f26e639c9941822e00ad9bc5ca855",
}


@pytest.mark.parametrize("name", RECORDED)
def test_an_old_checkpoint_has_the_fingerprint_it_had(name, tmp_path):
    with tarfile.open(CHECKPOINTS) as archive:
        archive.extract(f"{name}.ckpt", tmp_path, filter="data")
    file = str(tmp_path / f"{name}.ckpt")
    model = load(file)
    assert fingerprint(model) == RECORDED[name]
    assert fingerprint_of_file(model, file) == RECORDED[name]


def test_a_fingerprint_depends_on_weights_clipping_and_noise():
    network = tiny_unet()

    def of(**changes):
        return fingerprint(some_ddpm(network=network, **changes))

    plain = of()
    assert len({plain, of(clip=False), of(noise=GammaNoise(), sampler=None)}) == 3
    assert of(noise=GaussianNoise(), sampler=DDIM(0.5)) == plain

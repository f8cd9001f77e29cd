"""The public names. `ddim_pl/__init__.py` reads their homes from here, and imports when used."""

from ddim_pl.clipping import Clipping as Clipping
from ddim_pl.clipping import ClipRange as ClipRange
from ddim_pl.clipping import DynamicThreshold as DynamicThreshold
from ddim_pl.data.base import ImageDataModule as ImageDataModule
from ddim_pl.data.celeba import CelebADataModule as CelebADataModule
from ddim_pl.data.cifar10 import CIFAR10DataModule as CIFAR10DataModule
from ddim_pl.data.digits import DigitsDataModule as DigitsDataModule
from ddim_pl.data.huggingface import HuggingFaceDataModule as HuggingFaceDataModule
from ddim_pl.data.image_folder import ImageFolderDataModule as ImageFolderDataModule
from ddim_pl.data.image_zip import ImageZipDataModule as ImageZipDataModule
from ddim_pl.data.imagenet import ImageNetDataModule as ImageNetDataModule
from ddim_pl.data.shards import ShardDataModule as ShardDataModule
from ddim_pl.data.teacher_pairs import TeacherPairsDataModule as TeacherPairsDataModule
from ddim_pl.data.torchvision_sets import TorchvisionDataModule as TorchvisionDataModule
from ddim_pl.denoiser import Denoiser as Denoiser
from ddim_pl.denoiser import NetworkDenoiser as NetworkDenoiser
from ddim_pl.guidance import Guidance as Guidance
from ddim_pl.guidance import Guided as Guided
from ddim_pl.networks.unet import UNet as UNet
from ddim_pl.noise import GammaNoise as GammaNoise
from ddim_pl.noise import GaussianNoise as GaussianNoise
from ddim_pl.noise import Noise as Noise
from ddim_pl.noise import latents as latents
from ddim_pl.samplers import DDIM as DDIM
from ddim_pl.samplers import DEQ as DEQ
from ddim_pl.samplers import PNDM as PNDM
from ddim_pl.samplers import Ancestral as Ancestral
from ddim_pl.samplers import Consistency as Consistency
from ddim_pl.samplers import DPMSolverPP as DPMSolverPP
from ddim_pl.samplers import GammaExact as GammaExact
from ddim_pl.samplers import GammaMoment as GammaMoment
from ddim_pl.samplers import GammaQuantile as GammaQuantile
from ddim_pl.samplers import GammaReport as GammaReport
from ddim_pl.samplers import Heun as Heun
from ddim_pl.samplers import ParaDiGMS as ParaDiGMS
from ddim_pl.samplers import RePaint as RePaint
from ddim_pl.samplers import Sampler as Sampler
from ddim_pl.schedules import CosineLogSNRSchedule as CosineLogSNRSchedule
from ddim_pl.schedules import EDMSchedule as EDMSchedule
from ddim_pl.schedules import ImprovedCosineSchedule as ImprovedCosineSchedule
from ddim_pl.schedules import LinearSchedule as LinearSchedule
from ddim_pl.schedules import NoiseSchedule as NoiseSchedule
from ddim_pl.schedules import ScaledLinearSchedule as ScaledLinearSchedule
from ddim_pl.schedules import ZeroTerminalSNR as ZeroTerminalSNR
from ddim_pl.timesteps import ddim_uniform as ddim_uniform
from ddim_pl.timesteps import doubling as doubling
from ddim_pl.timesteps import explicit as explicit
from ddim_pl.timesteps import exponential as exponential
from ddim_pl.timesteps import first100last100 as first100last100
from ddim_pl.timesteps import karras as karras
from ddim_pl.timesteps import last100 as last100
from ddim_pl.timesteps import leading as leading
from ddim_pl.timesteps import linear as linear
from ddim_pl.timesteps import linspace as linspace
from ddim_pl.timesteps import quadratic as quadratic
from ddim_pl.timesteps import trailing as trailing
from ddim_pl.timesteps import uniform_log_snr as uniform_log_snr
from ddim_pl.training import DDPM as DDPM
from ddim_pl.training import TRACT as TRACT
from ddim_pl.training import ConsistencyModel as ConsistencyModel
from ddim_pl.training import DiffusionModule as DiffusionModule
from ddim_pl.training import GuidanceDistillation as GuidanceDistillation
from ddim_pl.training import LuhmanDistillation as LuhmanDistillation
from ddim_pl.training import ProgressiveDistillation as ProgressiveDistillation
from ddim_pl.training import RectifiedFlow as RectifiedFlow
from ddim_pl.training.loading import load as load

__version__: str
__all__: list[str]

def __dir__() -> list[str]: ...

"""Features of the Inception network, and the FID over them."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dng_math import checks
from dng_math.distances import frechet_distance

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
from dng_models.support.metrics import FEW_IMAGES, Moments, float_images


@dataclass(frozen=True, eq=False)
class FeatureSums:
    """Sums over images of Inception's features and of their outer products, in float64.

    Attributes
    ----------
    total : Tensor, shape (F,)
        Sum of the features.
    products : Tensor, shape (F, F)
        Sum of the outer products of each feature vector with itself.
    count : int
        Number of images.
    """

    total: Tensor
    products: Tensor
    count: int

    @property
    def moments(self) -> Moments:
        """Mean and covariance (divided by N - 1) of the features."""
        mean = self.total / self.count
        scatter = self.products - self.count * mean.outer(mean)
        return Moments(mean.numpy(), (scatter / (self.count - 1)).numpy())


class FrechetInception:
    """FID: the Frechet distance of Inception's features (Heusel et al. 2017), by torchmetrics.

    Images are clamped, rounded to 8 bits and expanded to three channels here, because torchmetrics'
    own conversion from [0, 1] rounds down.  An incomplete last batch counts too.

    Parameters
    ----------
    feature_extractor : Module, optional
        Used instead of Inception: maps 8-bit images (N, 3, H, W) to features (N, F) and has F as
        its attribute ``num_features``.
    weights : Path or str, optional
        File with the weights of torch-fidelity's Inception.  Default: torch-fidelity's cached
        copy, downloaded if there is none.
    batch_size : int
        Images per call of the network, at least 1.
    device : torch.device or str, optional
        Where the network runs; default the CPU.

    Raises
    ------
    ModuleNotFoundError
        If torch-fidelity, which provides the network, is not installed.
    FileNotFoundError, OSError
        If ``weights`` is not a file, or the default weights cannot be downloaded.
    TypeError, ValueError
        If ``batch_size`` is not an integer of at least 1.
    """

    def __init__(
        self,
        feature_extractor: nn.Module | None = None,
        *,
        weights: Path | str | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        if feature_extractor is None and find_spec("torch_fidelity") is None:
            raise ModuleNotFoundError(
                "FID needs the Inception network of torch-fidelity: pip install torch-fidelity"
            )
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"weights must be a file of Inception's weights, got {weights}")
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self._metric = FrechetInceptionDistance(
            2048 if feature_extractor is None else feature_extractor,
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
        self._metric.inception.eval()
        self._metric.to(device or "cpu")

    def sums(self, images: Tensor, cache: Path | str | None = None) -> FeatureSums:
        """Compute the sums of the features of images.

        Parameters
        ----------
        images : Tensor, shape (N, 1 or 3, H, W)
            Floats in [-1, 1], clamped here, or uint8, used unchanged; N >= 2.
            :func:`float_images` says how other ranges are detected.
        cache : Path or str, optional
            Folder where the sums are kept; they are read from it when the same images and network
            come again.

        Returns
        -------
        FeatureSums
            On the CPU.

        Raises
        ------
        TypeError, ValueError
            If images are no such tensor, not finite, or floats in [0, 255]; if a feature is not
            finite, or the cached file is damaged.
        """
        import torch

        from dng_models.support import files

        floats = float_images("images", images)
        if images.shape[1] not in (1, 3) or len(images) < 2:
            raise ValueError(
                f"images must have shape (N, 1 or 3, H, W) with N >= 2, got {tuple(images.shape)}"
            )
        eight_bit = images
        if images.dtype != torch.uint8:
            eight_bit = ((floats.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        eight_bit = eight_bit.cpu()
        path = None
        if cache is not None:
            path = Path(cache) / f"inception-{self._digest(eight_bit)}.safetensors"
            if path.is_file():
                kept, _ = files.load_tensors(path)
                size = self._metric.real_features_sum.numel()
                shapes = {name: tuple(each.shape) for name, each in sorted(kept.items())}
                if shapes != {"count": (), "products": (size, size), "total": (size,)}:
                    raise ValueError(
                        f"{path} must hold the sums of {size} features, got tensors {shapes}: "
                        "remove it, and it is made again"
                    )
                return FeatureSums(kept["total"], kept["products"], int(kept["count"]))

        self._metric.reset()
        with torch.no_grad():
            for batch in torch.split(eight_bit, self.batch_size):
                colour = batch.expand(-1, 3, -1, -1).to(self._metric.device)
                self._metric.update(colour, real=True)
        found = FeatureSums(
            total=self._metric.real_features_sum.cpu().clone(),
            products=self._metric.real_features_cov_sum.cpu().clone(),
            count=len(images),
        )
        if not torch.isfinite(found.products).all():
            raise ValueError(
                "feature_extractor must give finite features, and of these images it does not"
            )
        if path is not None:
            kept = {"total": found.total, "products": found.products}
            files.save_tensors(path, kept | {"count": torch.tensor(found.count)})
        return found

    def distance(self, images: FeatureSums, data: FeatureSums) -> float:
        """FID of images and data; warns below 10,000 images, where it is mostly bias."""
        if images.count < FEW_IMAGES:
            warnings.warn(
                f"FID of {images.count} images is mostly bias, and comparable with no other "
                f"number of images; take {FEW_IMAGES} or more",
                stacklevel=2,
            )
        return frechet_distance(images.moments, data.moments)

    @cached_property
    def _network_digest(self) -> bytes:
        digest = hashlib.sha256(type(self._metric.inception).__qualname__.encode())
        for name, value in self._metric.inception.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.digest()

    def _digest(self, eight_bit: Tensor) -> str:
        """Hash of the network, the images' shape and their pixels: names the cached file."""
        digest = hashlib.sha256(self._network_digest + repr(tuple(eight_bit.shape)).encode())
        digest.update(eight_bit.numpy().tobytes())
        return digest.hexdigest()[:12]

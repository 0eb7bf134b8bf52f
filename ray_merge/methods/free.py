"""FR-Merging, the backbone of FREE-Merging: deltas without their low frequencies, summed.

Formula: arXiv 2411.16815: tau = lambda sum_i IFFT2(M * FFT2(weight_i tau_i)), M a mask of frequencies. Distances are
counted in steps of the transform, shares are of min(O, I), as in both codes. What `compat` changes:

    paper     M = 0 where the signed frequency (u, v) is nearer to 0 than cutoff
    tara      TARA's code: M = 0 nearer than max(1, floor(cutoff)) to (O // 2, I // 2). The spectrum is not shifted,
              so these are the highest frequencies, not the lowest; with an fftshift it would be `paper`
    authors   their ViT code: M = 1 within filter_ratio of (O // 2, I // 2), the highest frequencies, and 2 on the ring
              at floor(min / 10), which two of their masks share

The filter is linear and the same for every adapter: it is applied once, to the sum. FFT2(B A) = FFT(B) FFT(A^T)^T, so
the spectrum is a product of thin factors, made for the frequencies that are needed and no others; where M = 1
nothing needs to be transformed, so the result is the sum less the part of the spectrum that 1 - M touches. Taking
the real part, as both codes do, averages M over (u, v) and (-u, -v). A DoRA delta has no such product and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_merge.algebra.delta import BlockDelta, LowRankDelta
from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.catalogue.free import BLOCK_ENTRIES, HELD_ENTRIES, Free
from ray_merge.methods.context import Context

RADIUS_DIGITS = 9
"""0.1 * 30 is 3.0000000000000004: radii are rounded, or the ring at distance 3 would be inside."""


def free(site: SiteFactors, p: Free, context: Context) -> BlockDelta:
    """The filtered sum, row chunk by row chunk."""
    total = LowRankDelta(*site.weighted_sum(p.weight))
    mask = Mask(site.shape, p)
    u_U, v_V = (index.to(site.device) for index in mask.touched())
    if not len(u_U) or not total.rank:
        return BlockDelta(site.shape, site.dtype, site.device, total.chunk)
    complex_dtype = torch.complex128 if site.dtype == torch.float64 else torch.complex64
    left_UR = torch.fft.fft(total.B_OR.double(), dim=0).to(complex_dtype)[u_U]
    right_RV = torch.fft.rfft(total.A_RI.double(), dim=1).to(complex_dtype)[:, v_V]
    removed = Removed(site.shape, mask, u_U, v_V, left_UR, right_RV)
    return BlockDelta(
        site.shape, site.dtype, site.device, lambda index: total.chunk(index) - removed.chunk(index)
    )


class Mask:
    """1 - M, for frequencies v in 0..I // 2 and all u.

    Args:
        shape: (O, I).
        p: the method's parameters.
    """

    def __init__(self, shape: tuple[int, int], p: Free) -> None:
        side = min(shape)
        self._compat = p.compat
        cutoff = round(p.cutoff * side, RADIUS_DIGITS)
        self._cutoff = float(max(1, int(cutoff))) if p.compat == "tara" else cutoff
        self._ring, self._reach = side // 10, round(p.filter_ratio * side, RADIUS_DIGITS)
        self._rows, self._columns = self._squares(shape[0]), self._squares(shape[1])
        self._half = shape[1] // 2 + 1

    def _squares(self, size: int) -> Tensor:
        """(2, size): squared distances along one axis, of each frequency and of its negative; int64."""
        place = torch.arange(size)
        from_middle = place - size // 2
        distance = torch.minimum(place, size - place) if self._compat == "paper" else from_middle
        squared = distance.square()
        return torch.stack([squared, squared[(-place) % size]])

    def block(self, u_U: Tensor, v_V: Tensor) -> Tensor:
        """1 - M at these frequencies, averaged with their negatives, (U, V), float32 on the CPU."""
        passed = [
            self._passed(self._rows[side, u_U][:, None] + self._columns[side, v_V][None]) for side in (0, 1)
        ]
        return 1.0 - (passed[0] + passed[1]) / 2

    def _passed(self, squared: Tensor) -> Tensor:
        if self._compat != "authors":
            return (squared >= self._cutoff**2).float()
        ring = self._ring**2
        return (squared <= ring).float() + ((squared >= ring) & (squared <= self._reach**2)).float()

    def touched(self) -> tuple[Tensor, Tensor]:
        """The u and the v at which 1 - M is somewhere not 0."""
        v_V = torch.arange(self._half)
        rows, columns = [], torch.zeros(self._half, dtype=torch.bool)
        for u_U in torch.split(torch.arange(self._rows.shape[1]), max(1, BLOCK_ENTRIES // self._half)):
            changed = self.block(u_U, v_V) != 0
            rows.append(u_U[changed.any(dim=1)])
            columns |= changed.any(dim=0)
        return torch.cat(rows), columns.nonzero()[:, 0]


class Removed:
    """IFFT2((1 - M) * FFT2(B A)), by chunks of rows.

    Args:
        shape: (O, I).
        mask: what is removed.
        rows: (U,), row frequencies that are touched.
        columns: (V,), column frequencies that are touched, of 0..I // 2.
        B_UR: FFT(B) at u.
        A_RV: FFT(A) at v.
    """

    def __init__(
        self, shape: tuple[int, int], mask: Mask, rows: Tensor, columns: Tensor, B_UR: Tensor, A_RV: Tensor
    ) -> None:
        self._shape, self._mask = shape, mask
        self._rows, self._columns = rows, columns
        self._B_UR, self._A_RV = B_UR, A_RV
        self._step = chunk_rows(shape[1])
        size = max(1, BLOCK_ENTRIES // max(min(self._step, shape[0]), len(columns)))
        self._places = [slice(start, start + size) for start in range(0, len(rows), size)]
        angle = torch.arange(shape[0], dtype=torch.float64, device=rows.device) * (2 * torch.pi / shape[0])
        self._roots_O = torch.polar(torch.ones_like(angle), angle).to(B_UR.dtype)
        few = len(rows) * len(columns) <= HELD_ENTRIES
        self._held = [self._spectrum(place) for place in self._places] if few else None

    def chunk(self, index: int) -> Tensor:
        """Rows of chunk `index`, (C, I)."""
        stop = min((index + 1) * self._step, self._shape[0])
        m_C = torch.arange(index * self._step, stop, device=self._rows.device)
        rows_CV = self._A_RV.new_zeros(len(m_C), len(self._columns))
        for number, place in enumerate(self._places):
            spectrum_UV = self._spectrum(place) if self._held is None else self._held[number]
            rows_CV += self._phases(m_C, self._rows[place]) @ spectrum_UV
        spectrum_CF = self._A_RV.new_zeros(len(m_C), self._shape[1] // 2 + 1)
        spectrum_CF[:, self._columns] = rows_CV
        rows_CI: Tensor = torch.fft.irfft(spectrum_CF, n=self._shape[1], dim=1)
        return rows_CI.div_(self._shape[0])

    def _spectrum(self, place: slice) -> Tensor:
        """(1 - M) * FFT2(B A) for a block of row frequencies, (U, V)."""
        weights_UV = self._mask.block(self._rows[place].cpu(), self._columns.cpu())
        return (self._B_UR[place] @ self._A_RV).mul_(weights_UV.to(self._rows.device))

    def _phases(self, m_C: Tensor, u_U: Tensor) -> Tensor:
        """exp(2 pi i m u / O), (C, U); m u is reduced as a whole number, or a large one would lose its phase."""
        return self._roots_O[torch.outer(m_C, u_U) % self._shape[0]]

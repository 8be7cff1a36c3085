"""Return distributions: what a value network's scores mean, how they are fitted, and how strongly they guide.

A value network predicts Z(x, y), the law of the return when π_ref finishes the answer after prefix x and
token y. Everything here reads raw scores [..., S]; leading axes are free and η, where asked for, has exactly
those axes.
"""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.types import Array

KINDS = ('bernoulli', 'categorical', 'mse')
PROJECTIONS = ('nearest', 'two_hot', 'hl_gauss')
OFFSETS = ('qsharp', 'cd', 'fudge')
METHODS = OFFSETS + ('vas',)  # that guide; the last is 'cd' with another rule for tokens that are no candidates


def log_mean_exp(log_probs: Array, atoms: Array, eta: Array) -> Array:
    """log E exp(Z / η), the logarithm of the paper's guiding weight (equation 5).

    Args:
      log_probs: normalised log pmf of Z over the atoms.  # [..., K]
      atoms: values of Z, increasing.  # [K]
      eta: KL coefficient, > 0; at `inf` the result is exactly 0.  # [...]

    Returns:
      Nats. Accurate from η = 1e-3 upwards; gradients with respect to the log pmf are finite.  # [...]
    """
    atoms = jnp.reshape(jnp.asarray(atoms, log_probs.dtype), (1,) * (log_probs.ndim - 1) + (-1,))
    below_top = (atoms - atoms[..., -1:]) / jnp.asarray(eta)[..., None]
    # Two forms of log E exp((Z - top) / η). The direct one cancels when the exponent is small (large η), the
    # other when nearly all mass lies far below the top (small η); each is used where it is accurate.
    direct = jax.nn.logsumexp(log_probs + below_top, axis=-1)
    excess = jnp.sum(jnp.exp(log_probs) * jnp.expm1(below_top), axis=-1)
    near = excess > -0.5
    relative = jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), direct)
    return jnp.where(jnp.isinf(eta), 0.0, relative + atoms[..., -1] / eta)


@dataclasses.dataclass(frozen=True)
class ReturnDistribution:
    """How scores [..., S] stand for a law of the return on finitely many atoms. Build it with `make`.

    Attributes:
      kind: 'bernoulli' (one logit, two atoms), 'categorical' (one logit per atom), or 'mse' (one logit whose
        sigmoid is regressed on the return by squared error and then read as a Bernoulli: the paper's
        ablation).
      atoms: values of the return, strictly increasing; v_min and v_max for 'bernoulli' and 'mse'.
      projection: how an observed return is spread over the atoms: all on the 'nearest' (of two equally near
        ones the lower), 'two_hot' (on its two neighbours, keeping the mean), or 'hl_gauss' (a normal law
        around it, cut to the support and integrated over the cells around the atoms).
      sigma: standard deviation of 'hl_gauss', in gaps between atoms.
    """

    kind: str
    atoms: tuple[float, ...]
    projection: str = 'nearest'
    sigma: float = 0.75

    @property
    def num_scores(self) -> int:
        """S, the number of outputs the value network needs per token."""
        return len(self.atoms) if self.kind == 'categorical' else 1

    @property
    def v_min(self) -> float:
        """The smallest return."""
        return self.atoms[0]

    @property
    def v_max(self) -> float:
        """The largest return."""
        return self.atoms[-1]

    def log_probs(self, scores: Array) -> Array:
        """Normalised log pmf over the atoms.  # [..., S] -> [..., K]"""
        if self.kind == 'categorical':
            return jax.nn.log_softmax(scores, axis=-1)
        return jnp.concatenate([jax.nn.log_sigmoid(-scores), jax.nn.log_sigmoid(scores)], axis=-1)

    def mean(self, scores: Array) -> Array:
        """E[Z], in units of the reward.  # [..., S] -> [...]"""
        if self.kind == 'categorical':
            # Measured from the lowest atom, so that equal atoms far from zero lose no digits.
            heights = self._row(np.subtract(self.atoms, self.v_min), scores)
            return self.v_min + jnp.sum(jax.nn.softmax(scores, axis=-1) * heights, axis=-1)
        return self.v_min + (self.v_max - self.v_min) * jax.nn.sigmoid(scores[..., 0])

    def target(self, reward: Array) -> Array:
        """The projected pmf of an observed return; sums to 1. Returns beyond the support count as its end.

        # [...] -> [..., K]
        """
        atoms = np.asarray(self.atoms)
        reward = jnp.clip(reward, self.v_min, self.v_max)[..., None]
        middles = (atoms[1:] + atoms[:-1]) / 2
        if self.projection == 'nearest':
            index = jnp.sum(reward > self._row(middles, reward), axis=-1)
            return jax.nn.one_hot(index, len(atoms), dtype=reward.dtype)
        if self.projection == 'two_hot':
            lower = jnp.sum(reward >= self._row(atoms[1:-1], reward), axis=-1)
            left = self._row(atoms[:-1], reward)
            share = (reward - left) / self._row(np.diff(atoms), reward)
            share = jnp.take_along_axis(share, lower[..., None], axis=-1)
            lower_mass = (1 - share) * jax.nn.one_hot(lower, len(atoms), dtype=reward.dtype)
            return lower_mass + share * jax.nn.one_hot(lower + 1, len(atoms), dtype=reward.dtype)
        gaps = np.diff(atoms)
        edges = np.concatenate([[atoms[0] - gaps[0] / 2], middles, [atoms[-1] + gaps[-1] / 2]])
        below = jax.scipy.stats.norm.cdf((self._row(edges, reward) - reward) / (self.sigma * gaps.mean()))
        mass = below[..., 1:] - below[..., :-1]
        return mass / jnp.sum(mass, axis=-1, keepdims=True)

    def loss(self, scores: Array, reward: Array) -> Array:
        """What the fit minimises: cross-entropy to the projected return, in nats (paper §2.2).

        For 'mse' the squared error of the mean, in squared units of the reward.  # [..., S], [...] -> [...]
        """
        if self.kind == 'mse':
            return jnp.square(self.mean(scores) - reward)
        return -jnp.sum(self.target(reward) * self.log_probs(scores), axis=-1)

    def log_weight(self, scores: Array, eta: Array, offset: str = 'qsharp') -> Array:
        """What is added to a token's log-probability under π_ref; exactly 0 where η is `inf`.

        Args:
          scores: raw outputs of the value network.  # [..., S]
          eta: KL coefficient, > 0.  # [...]
          offset: 'qsharp', log E exp(Z / η); 'cd', E[Z] / η (controlled decoding); 'fudge', the log of the
            mean rescaled to [0, 1], which for rewards 0 and 1 is the log probability of success and does not
            depend on η.

        Returns:
          Nats.  # [...]
        """
        if offset == 'qsharp':
            return log_mean_exp(self.log_probs(scores), jnp.asarray(self.atoms, scores.dtype), eta)
        if offset == 'cd':
            return jnp.where(jnp.isinf(eta), 0.0, self.mean(scores) / eta)
        if offset == 'fudge':
            heights = np.subtract(self.atoms[1:], self.v_min) / (self.v_max - self.v_min)
            log_probs = self.log_probs(scores)[..., 1:]
            success = jax.nn.logsumexp(log_probs + self._row(np.log(heights), scores), axis=-1)
            return jnp.where(jnp.isinf(eta), 0.0, success)
        raise ValueError(f'offset is {offset!r}; it must be one of {", ".join(OFFSETS)}.')

    def log_weight_range(self, eta: Array, offset: str = 'qsharp') -> tuple[Array, Array]:
        """Between what `log_weight` lies, whatever the scores.  # [...] -> 2 x [...]"""
        if offset == 'fudge':
            return jnp.full_like(eta, -jnp.inf), jnp.zeros_like(eta)
        return self.v_min / eta, self.v_max / eta

    def check_rewards(self, rewards: np.ndarray) -> None:
        """Raises ValueError unless every reward has a place on the support.

        NaN, an abstention, is passed over.
        """
        rewards = np.asarray(rewards, np.float64)
        rewards = rewards[~np.isnan(rewards)]
        slack = self._slack
        outside = (rewards < self.v_min - slack) | (rewards > self.v_max + slack)
        if outside.any():
            raise ValueError(
                f'{outside.sum()} of {rewards.size} rewards lie outside [v_min, v_max] = '
                f'[{self.v_min:g}, {self.v_max:g}], the first is {rewards[outside][0]:g}. '
                'Widen v_min and v_max, or rescale the reward.')
        between = np.minimum(rewards - self.v_min, self.v_max - rewards) > slack
        if self.kind == 'bernoulli' and self.projection == 'nearest' and between.any():
            raise ValueError(
                f'{between.sum()} of {rewards.size} rewards are neither v_min = {self.v_min:g} nor v_max = '
                f'{self.v_max:g}, the first is {rewards[between][0]:g}; "bernoulli" would round them. '
                'Use the kind "categorical", or the projection "two_hot".')

    def at_ends(self, rewards: np.ndarray) -> np.ndarray:
        """Returns rewards, those that miss an end of the support by a rounding at that end.

        A sum of weighted terms may: what earns .9999999999999999 of 1 is right.  # [N] -> [N]
        """
        rewards = np.where(np.abs(rewards - self.v_min) <= self._slack, self.v_min, rewards)
        return np.where(np.abs(rewards - self.v_max) <= self._slack, self.v_max, rewards)

    @property
    def _slack(self) -> float:
        return 1e-6 * (self.v_max - self.v_min)

    def _row(self, values: np.ndarray, like: Array) -> Array:
        return jnp.reshape(jnp.asarray(values, like.dtype), (1,) * (like.ndim - 1) + (-1,))


@functools.cache
def make(kind: str, v_min: float, v_max: float, num_atoms: int = 2, projection: str = 'nearest',
         sigma: float = 0.75) -> ReturnDistribution:
    """A return distribution on [v_min, v_max].

    Args:
      kind: one of `KINDS`.
      v_min: the smallest return.
      v_max: the largest return.
      num_atoms: number of equally spaced atoms, both ends included; used by 'categorical' alone.
      projection: one of `PROJECTIONS`; 'mse' has no use for it.
      sigma: width of 'hl_gauss' in gaps between atoms.

    Raises:
      ValueError: an argument has no meaning.
    """
    if kind not in KINDS:
        raise ValueError(f'kind is {kind!r}; it must be one of {", ".join(KINDS)}.')
    if projection not in PROJECTIONS:
        raise ValueError(f'projection is {projection!r}; it must be one of {", ".join(PROJECTIONS)}.')
    if not (np.isfinite(v_min) and np.isfinite(v_max) and v_min < v_max):
        raise ValueError(
            f'v_min is {v_min:g} and v_max is {v_max:g}; both must be finite and v_min the smaller.')
    if kind != 'categorical':
        if projection == 'hl_gauss':
            raise ValueError(
                f'projection "hl_gauss" needs the kind "categorical", not {kind!r}: it spreads a return over '
                'neighbouring atoms. Use "nearest" or "two_hot".')
        return ReturnDistribution(kind, (float(v_min), float(v_max)), projection)
    if num_atoms < 2:
        raise ValueError(f'num_atoms is {num_atoms}; a categorical distribution needs at least 2.')
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f'sigma is {sigma:g}; it must be positive (a usual value is 0.75).')
    atoms = tuple(float(atom) for atom in np.linspace(v_min, v_max, num_atoms))
    return ReturnDistribution(kind, atoms, projection, float(sigma))

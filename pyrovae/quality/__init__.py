"""How near pictures are to data, and codes to what data were made from. Arrays in, no likelihood out."""

from pyrovae.quality.disentangling import Supervised as Supervised
from pyrovae.quality.disentangling import Unsupervised as Unsupervised
from pyrovae.quality.disentangling import supervised as supervised
from pyrovae.quality.disentangling import udr as udr
from pyrovae.quality.disentangling import unsupervised as unsupervised
from pyrovae.quality.frechet import Frechet as Frechet
from pyrovae.quality.frechet import frechet_distance as frechet_distance
from pyrovae.quality.frechet import gaussian_distance as gaussian_distance
from pyrovae.quality.reconstructions import QUALITIES as QUALITIES
from pyrovae.quality.reconstructions import Quality as Quality
from pyrovae.quality.reconstructions import is_image as is_image
from pyrovae.quality.reconstructions import psnr as psnr
from pyrovae.quality.reconstructions import reconstruction_quality as reconstruction_quality
from pyrovae.quality.reconstructions import sse as sse
from pyrovae.quality.reconstructions import ssim as ssim

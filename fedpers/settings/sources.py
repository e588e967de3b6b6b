"""Where published data sets come from, what is known of their licence, and how their files are had."""

from __future__ import annotations

from dataclasses import dataclass

DOWNLOADED = "downloaded by torchvision, or in dataset.root"
BY_HAND = "fetched by hand, in dataset.root"
BUILT_IN = "nothing to fetch"
NONE_STATED = "none stated"


@dataclass(frozen=True)
class Source:
    """Of one data set.

    Parameters
    ----------
    publication : str
        Who made it, and when.
    url : str
        Where it is to be had.
    licence : str
        What is known of its terms; "none stated" if nothing is.
    files : str
        How its files are had.
    """

    publication: str
    url: str
    licence: str
    files: str

    def __str__(self) -> str:
        return f"{self.publication}, {self.url}; licence: {self.licence}; files: {self.files}"


SOURCES = {
    "ag_news": Source(
        "Gulli 2005, as Zhang et al. 2015 cut it",
        "http://groups.di.unipi.it/~gulli/AG_corpus_of_news_articles.html",
        "for research and other non-commercial uses",
        BY_HAND,
    ),
    "digits": Source(
        "Alpaydin and Kaynak 1998", "https://archive.ics.uci.edu/dataset/80", "CC BY 4.0", "come with scikit-learn"
    ),
    "mnist": Source(
        "LeCun, Cortes and Burges 1998",
        "http://yann.lecun.com/exdb/mnist",
        "commonly given as CC BY-SA 3.0",
        DOWNLOADED,
    ),
    "fashion_mnist": Source(
        "Xiao, Rasul and Vollgraf 2017", "https://github.com/zalandoresearch/fashion-mnist", "MIT", DOWNLOADED
    ),
    "kmnist": Source("Clanuwat et al. 2018", "http://codh.rois.ac.jp/kmnist", "CC BY-SA 4.0", DOWNLOADED),
    "emnist": Source(
        "Cohen et al. 2017, of NIST Special Database 19",
        "https://www.nist.gov/itl/products-and-services/emnist-dataset",
        NONE_STATED,
        DOWNLOADED,
    ),
    "usps": Source("Hull 1994", "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets", NONE_STATED, DOWNLOADED),
    "svhn": Source(
        "Netzer et al. 2011", "http://ufldl.stanford.edu/housenumbers", "for non-commercial use only", DOWNLOADED
    ),
    "cifar10": Source(
        "Krizhevsky 2009",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "none stated; made of Tiny Images, which were withdrawn",
        DOWNLOADED,
    ),
    "cifar100": Source(
        "Krizhevsky 2009",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "none stated; made of Tiny Images, which were withdrawn",
        DOWNLOADED,
    ),
    "har": Source(
        "Anguita et al. 2013",
        "https://archive.ics.uci.edu/dataset/240",
        "CC BY 4.0 at UCI; its README allows no commercial use",
        BY_HAND,
    ),
    "hf": Source(
        "Hugging Face",
        "https://huggingface.co/datasets",
        "that of the set",
        "downloaded by the library datasets, or saved by it to dataset.path",
    ),
    "synthetic_ratings": Source("made up by this package", "no files", "that of this package", BUILT_IN),
    "movielens100k": Source(
        "Harper and Konstan 2015",
        "https://grouplens.org/datasets/movielens/100k",
        "research only, no redistribution, no commercial use without permission",
        BY_HAND,
    ),
    "movielens1m": Source(
        "Harper and Konstan 2015",
        "https://grouplens.org/datasets/movielens/1m",
        "research only, no redistribution, no commercial use without permission",
        BY_HAND,
    ),
    "amazon_video": Source(
        "McAuley et al. 2015", "https://jmcauley.ucsd.edu/data/amazon", "none stated, for research", BY_HAND
    ),
    "lastfm2k": Source(
        "Cantador, Brusilovsky and Kuflik 2011",
        "https://grouplens.org/datasets/hetrec-2011",
        "non-commercial use",
        BY_HAND,
    ),
}
"""Sources of the sets that have a name; the others are files of one's own."""

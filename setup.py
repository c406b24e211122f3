"Packaging: every value comes from settings.ini, so the notebooks' build and pip agree."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['weights/*', 'calibrations/*']},
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'ray', 'faiss', 'qdrant', 'onnx')},
    entry_points={'nbdev': [f'{lib}={lib}._modidx:d'],
                  'console_scripts': cfg['console_scripts'].split()},
)

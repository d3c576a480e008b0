"""What the user asked: the recipe, its entries for single layers, and how both are read."""

from roundel.recipe.layer_config import matches, parse_layer_config, scheme_of_entry
from roundel.recipe.reading import parse_size
from roundel.recipe.recipe import RECIPES, STORED, TOGETHER, Recipe

__all__ = [
    "RECIPES",
    "STORED",
    "TOGETHER",
    "Recipe",
    "matches",
    "parse_layer_config",
    "parse_size",
    "scheme_of_entry",
]

"""Offline evaluation: is what is shown worth more than the most popular campaigns?"""

"""The paper's experiment in small: one flexible model beside fixed ones, at every count."""
